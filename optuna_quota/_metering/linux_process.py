"""What the kernel's high-water mark tells of memory that was gone before anyone looked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
import os
import time

from optuna_quota._metering.shared_pages import ProcessMemory


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
class MemorySnapshot:
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


def unseen_peak(before: MemorySnapshot, now: MemorySnapshot) -> int | None:
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


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class LinuxProcess:
    """One process by its open directory in /proc.

    A descriptor there stays bound to the process that it was opened for: when the number is
    reused, reading fails instead of showing a stranger.

    Args:
        pid: Its number.
        parent: The process that it was found under, None for a root.

    Attributes:
        started: Seconds from the boot to its creation, to a clock tick (10 ms).
        shareable: What of its memory, as last asked for, is shared memory, in bytes.
        statm: The sizes that its memory was last told from, as the kernel writes them.
        knows_peak: Whether the peak that the kernel keeps began no earlier than the metering.

    Raises:
        ProcessLookupError: If there is no such process (any more).
        OSError: If /proc can't be read.
    """

    __slots__ = (
        "_folder",
        "_mark",
        "_shared",
        "_stat",
        "_statm",
        "_status",
        "_swapped",
        "_swaps",
        "is_self",
        "knows_peak",
        "parent",
        "pid",
        "shareable",
        "started",
        "statm",
    )

    def __init__(self, pid: int, parent: LinuxProcess | None = None) -> None:
        self.pid = pid
        self.parent = parent
        self.is_self = pid == os.getpid()
        self.knows_peak = False
        self.statm = b""
        self._folder = self._stat = self._statm = self._status = -1
        self._shared, self.shareable, self._swapped = b"", 0, 0
        self._swaps = has_swap()
        self._mark: MemorySnapshot | None = None
        try:
            self._folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
            self._statm = self._open("statm")
            self._stat = self._open("stat")
            self._status = self._open("status")
            self.started = int(self._stat_fields()[19]) / _TICKS
        except FileNotFoundError as error:
            self.close()
            raise ProcessLookupError(f"There is no process {pid}.") from error
        except OSError:
            self.close()
            raise

    def memory(self) -> int:
        """Return the anonymous, shared and swapped bytes; 0 for a zombie.

        What is shared counts in full. statm gives the anonymous part (0.6 µs), but puts shared
        memory together with files: it is looked up in status (3 µs) when that sum has changed.

        Raises:
            OSError: If it is gone.
        """
        self.statm = os.pread(self._statm, 128, 0)
        _, resident, shared, _ = self.statm.split(b" ", 3)
        if self._swaps or shared != self._shared:
            self._take_others(self._read_status())
            self._shared = shared
        return (int(resident) - int(shared)) * _PAGE + self.shareable + self._swapped

    def share(self) -> ProcessMemory:
        """Return what it holds by the number of its holders; costs 0.1 to 1.4 ms.

        Nothing for a zombie; all as its own where it may not be asked (another user's).

        Raises:
            OSError: If it is gone.
        """
        status = self._read_status()
        shmem = _size(status, b"RssShmem:")
        held = _size(status, b"RssAnon:") + shmem + _size(status, b"VmSwap:")
        try:
            rollup = _sizes(self._read("smaps_rollup"))
        except OSError:
            # Of a zombie as well; what is gone altogether has failed above.
            return ProcessMemory(held, held, shmem)
        if b"Pss_Anon" not in rollup:  # before Linux 5.4
            return ProcessMemory(held, min(held, rollup.get(b"Pss", held)), shmem)
        # From the same read as what is divided: what is added in between is no sharing.
        held = rollup.get(b"Anonymous", 0) + shmem + rollup.get(b"Swap", 0)
        anonymous, divided = rollup[b"Pss_Anon"], rollup.get(b"Pss_Shmem", 0)
        # Dirty pages with another holder are anonymous ones and shared memory; of the latter
        # there is at most twice what dividing has taken off.
        common = rollup.get(b"Shared_Dirty", 0) - min(shmem, 2 * max(0, shmem - divided))
        common = max(0, min(common, rollup.get(b"Anonymous", 0)))
        return ProcessMemory(
            held=held,
            proportional=anonymous + divided + rollup.get(b"SwapPss", 0),
            shareable=shmem,
            common=common,
            common_part=max(0, anonymous - (rollup.get(b"Anonymous", 0) - common)),
        )

    def faulted(self) -> int:
        """Return the bytes of all pages that it has ever faulted in; raises OSError when gone."""
        return self.faults() * _PAGE

    def unseen_peak(self, huge: int) -> int | None:
        """Return what the kernel tells of a peak since this was last asked, None for nothing.

        Args:
            huge: The bytes of huge pages given out on this host.

        Raises:
            OSError: If it is gone.
        """
        status = self._read_status()
        if b"VmHWM:" not in status:
            return None
        now = MemorySnapshot(
            highest=_size(status, b"VmHWM:"),
            resident=_size(status, b"VmRSS:"),
            file=_size(status, b"RssFile:"),
            faults=self.faults(),
            huge=huge,
        )
        self._take_others(status)
        before, self._mark = self._mark, now
        return None if before is None else unseen_peak(before, now)

    def faults(self) -> int:
        """Return the number of page faults so far; raises OSError when it is gone."""
        fields = self._stat_fields()
        return int(fields[7]) + int(fields[9])

    def times(self) -> tuple[float, float]:
        """Return the CPU-seconds of its own and of its children that were waited for.

        Raises OSError when it is gone.
        """
        if self.is_self:
            import resource

            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            return time.process_time(), children.ru_utime + children.ru_stime
        fields = self._stat_fields()
        utime, stime, cutime, cstime = (int(value) / _TICKS for value in fields[11:15])
        own = utime + stime
        if self.parent is None:
            own = max(own, self._exact_time())
        return own, cutime + cstime

    def _exact_time(self) -> float:
        """Return its CPU-seconds to the nanosecond, where /proc counts in ticks of 10 ms.

        The clock's id is what clock_getcpuclockid(3) makes of a pid: ``~pid << 3 | 2``. It goes
        by number, so it is asked only for a root, right after its descriptor proved it alive.
        """
        with contextlib.suppress(OSError):
            return time.clock_gettime(~self.pid << 3 | 2)
        return 0.0

    def parent_pid(self) -> int:
        """Return the number of its parent; raises OSError when it is gone."""
        return int(self._stat_fields()[1])

    def children(self) -> set[int]:
        """Return the pids of the children of all its threads, none when it is gone."""
        pids: set[int] = set()
        with contextlib.suppress(OSError):
            task = self._open("task")
            try:
                for tid in os.listdir(task):
                    with contextlib.suppress(OSError):
                        pids.update(map(int, self._read(f"task/{tid}/children").split()))
            finally:
                os.close(task)
        return pids

    def reset_peak(self) -> None:
        """Let the peak start anew; needs no privilege on oneself and one's own children.

        Writing 5 to clear_refs sets the high-water mark to the present memory, see proc(5).
        Whoever else reads VmHWM or ru_maxrss of the process sees it reset as well.
        """
        self.knows_peak, self._mark = False, None
        with contextlib.suppress(OSError):
            handle = os.open("clear_refs", os.O_WRONLY, dir_fd=self._folder)
            try:
                os.write(handle, b"5")
                self.knows_peak = True
            finally:
                os.close(handle)

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        handles = (self._folder, self._stat, self._statm, self._status)
        self._folder = self._stat = self._statm = self._status = -1
        for handle in handles:
            if handle >= 0:
                os.close(handle)

    def _open(self, name: str) -> int:
        return os.open(name, os.O_RDONLY, dir_fd=self._folder)

    def _read(self, name: str) -> bytes:
        handle = self._open(name)
        try:
            return os.read(handle, 1 << 16)
        finally:
            os.close(handle)

    def _take_others(self, status: bytes) -> None:
        self.shareable = _size(status, b"RssShmem:")
        self._swapped = _size(status, b"VmSwap:")

    def _read_status(self) -> bytes:
        """Return the text of status, which for a zombie is without the sizes of memory."""
        return os.pread(self._status, 4096, 0)

    def _stat_fields(self) -> list[bytes]:
        """Return the fields of stat from the third on."""
        # The name, in parentheses, may hold anything; what follows the last one is numbers.
        return os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()


def has_swap() -> bool:
    """Return whether memory may be swapped out on this host."""
    try:
        with open("/proc/swaps", "rb") as file:
            return len(file.read().splitlines()) > 1
    except OSError:
        return True


def _size(text: bytes, name: bytes) -> int:
    """Return the bytes of one line such as ``VmRSS:  123 kB``, 0 without it."""
    at = text.find(name)
    if at < 0:
        return 0
    at += len(name)
    return int(text[at : at + 24].split(None, 1)[0]) * 1024


def _sizes(text: bytes) -> dict[bytes, int]:
    """Return the bytes of all lines of that form, by name without the colon."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(b":")
        fields = rest.split()
        if len(fields) == 2 and fields[1] == b"kB":
            found[name] = int(fields[0]) * 1024
    return found
