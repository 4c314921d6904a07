"""A pickled objective on its way to a trial's process: its pickle, large arrays, open files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import io
import mmap
import pickle
from typing import Any

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.mapped_files import FileRegion


@dataclass(frozen=True)
class Content:
    """Sizes of a payload that follows: the bytes of its pickles, and its buffers.

    Each buffer is described by its bytes and whether it is read-only, or by its file.
    """

    pickles: int
    buffers: tuple[tuple[int, bool] | FileRegion, ...]


@dataclass(frozen=True)
class Payload:
    """A pickled objective, with large buffers and open files beside the pickle."""

    # Of the objective, then of calls that set up the modules it refers to, then of None
    pickles: bytes
    # The memory of large arrays, sent and received without a copy
    buffers: Sequence[pickle.PickleBuffer | FileRegion]
    descriptors: Sequence[int]  # Open files, which the pickle refers to by index

    @property
    def content(self) -> Content:
        buffers = [b if isinstance(b, FileRegion) else b.raw() for b in self.buffers]
        return Content(
            len(self.pickles),
            tuple(
                b if isinstance(b, FileRegion) else (b.nbytes, bool(b.readonly)) for b in buffers
            ),
        )

    def send(self, channel: Channel) -> None:
        channel.send_raw(memoryview(self.pickles))
        for buffer in self.buffers:
            if not isinstance(buffer, FileRegion):
                channel.send_raw(buffer.raw())


class Received:
    """A payload in the trial's process, which holds it until the objective is loaded."""

    def __init__(self, channel: Channel, content: Content) -> None:
        self._pickles = io.BytesIO(bytes(content.pickles))
        with self._pickles.getbuffer() as memory:
            channel.receive_raw(memory)
        self._buffers = [_receive_buffer(channel, buffer) for buffer in content.buffers]

    def load(self) -> Any:
        # From now on only the objective refers to the buffers.
        with self._pickles:
            unpickler = pickle.Unpickler(self._pickles, buffers=self._buffers)
            self._buffers = []
            objective = unpickler.load()
            while (call := unpickler.load()) is not None:
                function, *arguments = call
                function(*arguments)
        return objective


def _receive_buffer(channel: Channel, content: tuple[int, bool] | FileRegion) -> memoryview:
    if isinstance(content, FileRegion):
        return content.open()
    size, readonly = content
    # Not on the heap, so that it is returned to the system after use.
    buffer = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    channel.receive_raw(buffer)
    return buffer.toreadonly() if readonly else buffer
