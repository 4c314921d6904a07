"""An objective's pickle with what is kept out of it: large buffers and open descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import mmap
import pickle

from optuna_quota._isolation.channel import Channel


@dataclass(frozen=True)
class Payload:
    """What is sent of an objective.

    Attributes:
        pickles: The objective's, then those of what the main module is to hold.
        states: How many of the latter there are.
        buffers: The memory of large arrays. It is sent from where it is and received where it
            stays: nothing of it is held twice.
        descriptors: Open files that it refers to by index.
    """

    pickles: bytes
    states: int
    buffers: Sequence[pickle.PickleBuffer]
    descriptors: Sequence[int]

    @property
    def sizes(self) -> tuple[tuple[int, bool], ...]:
        """The bytes of each buffer, and whether it is read-only."""
        views = [buffer.raw() for buffer in self.buffers]
        return tuple((view.nbytes, view.readonly) for view in views)

    def send_buffers(self, channel: Channel) -> None:
        """Send the buffers, after the message that tells their sizes."""
        for buffer in self.buffers:
            channel.send_raw(buffer.raw())


class InheritedDescriptor:
    """An open file on its way to a trial's process, by its place among those that are sent.

    Args:
        index: The place.
    """

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        """Return the file's descriptor, which is the caller's to close."""
        return inherited_descriptors[self._index]


# Filled in a trial's process.
inherited_descriptors: list[int] = []


def allocate(size: int) -> memoryview:
    """Return memory for a buffer; it goes back to the system when it is no longer used."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
