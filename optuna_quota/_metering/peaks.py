"""What the kernel's high-water mark tells of memory that was gone before anyone looked."""

from __future__ import annotations

from dataclasses import dataclass
import os


# The most bytes that a page fault brings in of anonymous memory in pages of 4 KiB. Files' pages
# come 16 or more at a time, anonymous huge pages 512.
_SMALL = 8 * 2**10
_HUGE_PAGE = 2 * 2**20
# Part of a growth that huge pages must account for, where it took few page faults.
_MOSTLY = 0.5
# Part of the memory by which the resident pages of files may have changed meanwhile.
_STEADY = 0.1
# Part of the high-water mark within which the present memory is the peak, seen as it is.
_SEEN = 0.01


@dataclass(frozen=True)
class Mark:
    """What the kernel tells of a process at one moment.

    Attributes:
        highest: The most resident bytes so far (VmHWM), with pages of files.
        resident: The resident bytes.
        file: The resident bytes of files' pages.
        faults: The page faults so far.
        huge: The bytes of anonymous huge pages that this host has given out so far, to whomever.
    """

    highest: int
    resident: int
    file: int
    faults: int
    huge: int


def unseen_peak(before: Mark, now: Mark) -> int | None:
    """Return the memory without files' pages at a peak between two looks: pure.

    The high-water mark counts pages of files as well, and what part of it they were is not kept.
    So it is used only where they can hardly have come and gone: a file that is read through a
    mapping and let go again takes few page faults, and no anonymous huge pages.

    Args:
        before: The look before.
        now: This look.

    Returns:
        The bytes; None where no peak went unseen, or it can't be told.
    """
    if now.highest <= before.highest or now.highest - now.resident <= _SEEN * now.highest:
        return None
    peak = now.highest - max(before.file, now.file)
    if abs(now.file - before.file) > _STEADY * peak:
        return None
    growth = now.highest - before.resident
    small = growth <= _SMALL * (now.faults - before.faults)
    huge = now.huge - before.huge >= _MOSTLY * growth
    return peak if small or huge else None


def read_huge_pages() -> int:
    """Return the bytes of anonymous huge pages that this host has given out, 0 where unknown."""
    try:
        handle = os.open("/proc/vmstat", os.O_RDONLY)
    except OSError:
        return 0
    try:
        _, found, rest = os.read(handle, 1 << 16).partition(b"\nthp_fault_alloc ")
    finally:
        os.close(handle)
    return int(rest.split(None, 1)[0]) * _HUGE_PAGE if found else 0
