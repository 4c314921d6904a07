"""Finds files that are mapped to memory, which a trial's process maps again instead of a copy.

A copy of ``np.load(path, mmap_mode="r")`` or ``torch.load(path, mmap=True)`` would hold the whole
file in memory, and what a trial writes would not reach the file.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass
import functools
import mmap
import os
import stat


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


@dataclass(frozen=True)
class _Mapping:
    """A line of ``/proc/self/maps``."""

    addresses: bytes
    start: int
    end: int
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
                        _Mapping(addresses, start, end, permissions, int(offset, 16), name)
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
