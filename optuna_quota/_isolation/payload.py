"""A pickled objective on its way to a trial's process: its pickle, large arrays, open files.

Files that are mapped to memory are mapped again: a copy of ``np.load(path, mmap_mode="r")`` or
``torch.load(path, mmap=True)`` would hold the whole file in memory, and what a trial writes would
not reach the file.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
import contextlib
from dataclasses import dataclass
import functools
import io
import mmap
import os
import pickle
import stat
from typing import Any, NamedTuple

from optuna_quota._isolation.channel import Channel


@dataclass(frozen=True)
class Payload:
    """A pickled objective, with large buffers and open files beside the pickle."""

    # Of the objective, then of calls that set up the modules it refers to, then of None
    pickles: memoryview
    # The memory of large arrays, sent and received without a copy
    buffers: Sequence[memoryview | FileRegion]
    descriptors: Sequence[int]  # Open files, which the pickle refers to by index

    def send(self, channel: Channel) -> None:
        """Send the sizes of the pickles and buffers, or the buffers' files, then their memory."""
        sizes = [b if isinstance(b, FileRegion) else (b.nbytes, b.readonly) for b in self.buffers]
        channel.send((self.pickles.nbytes, sizes))
        for buffer in (self.pickles, *self.buffers):
            if not isinstance(buffer, FileRegion):
                channel.send_raw(buffer)


class Received:
    """A payload in the trial's process, which holds it until the objective is loaded."""

    def __init__(self, channel: Channel) -> None:
        size, buffers = channel.receive()
        self._pickles = io.BytesIO(bytes(size))
        with self._pickles.getbuffer() as memory:
            channel.receive_raw(memory)
        self._buffers = [_receive_buffer(channel, buffer) for buffer in buffers]

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


def _receive_buffer(channel: Channel, sent: tuple[int, bool] | FileRegion) -> memoryview:
    if isinstance(sent, FileRegion):
        return sent.open()
    size, readonly = sent
    # Not on the heap, so that it is returned to the system after use.
    buffer = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    channel.receive_raw(buffer)
    return buffer.toreadonly() if readonly else buffer


# Files that are mapped to memory.


@dataclass(frozen=True)
class FileRegion:
    """A part of a file that is mapped to memory."""

    path: str
    offset: int
    size: int  # In bytes, as the offset
    readonly: bool
    shared: bool  # Whether writes are visible in all processes that map the file

    def open(self) -> memoryview:
        excess = self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "r+b" if self.shared and not self.readonly else "rb") as file:
            mapped = mmap.mmap(
                file.fileno(),
                excess + self.size,
                flags=mmap.MAP_SHARED if self.shared else mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ if self.readonly else mmap.PROT_READ | mmap.PROT_WRITE,
                offset=self.offset - excess,
            )
        return memoryview(mapped)[excess:]


class _Mapping(NamedTuple):
    """A line of ``/proc/self/maps``."""

    start: int
    end: int
    addresses: bytes
    permissions: bytes
    offset: int
    path: str


class MappedFiles:
    """The files that are mapped to the memory of this process, as of the first search."""

    def find(self, address: int, size: int, *, readonly: bool) -> FileRegion | None:
        """Return the part of a file that is mapped to this memory, None if there is none."""
        mappings = self._mappings
        place = bisect.bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1
        if size == 0 or place < 0 or address + size > mappings[place].end:
            return None
        found = mappings[place]
        offset = found.offset + address - found.start
        try:
            status = os.stat(found.path)
        except OSError:
            return None
        is_whole = stat.S_ISREG(status.st_mode) and status.st_size >= offset + size
        if not is_whole or not os.access(found.path, os.R_OK):
            return None
        is_writable, is_shared = (found.permissions[place] in b"ws" for place in (1, 3))
        if is_writable and not is_shared and self._is_modified(found.addresses):
            return None
        shared = is_shared and (readonly or is_writable)
        return FileRegion(found.path, offset, size, readonly, shared)

    @functools.cached_property
    def _mappings(self) -> list[_Mapping]:
        found = []
        # Only Linux has the file.
        with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as lines:
            for line in lines:
                addresses, permissions, offset, _, _, *path = line.rstrip(b"\n").split(None, 5)
                if path and path[0].startswith(b"/") and not path[0].endswith(b" (deleted)"):
                    start, end = (int(address, 16) for address in addresses.split(b"-"))
                    name = os.fsdecode(path[0])
                    found.append(
                        _Mapping(start, end, addresses, permissions, int(offset, 16), name)
                    )
        return found

    @functools.cache  # noqa: B019 - an instance lives as long as one pickler
    def _is_modified(self, addresses: bytes) -> bool:
        """Return whether this process has pages of its own in a private mapping."""
        with open("/proc/self/smaps", "rb") as lines:
            for field in _fields(addresses, lines):
                if field.startswith(b"Anonymous:"):
                    return field.split()[1] != b"0"
        return True


def _fields(addresses: bytes, lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line.startswith(addresses):
            yield from lines
