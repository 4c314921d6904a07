"""One process by its open directory in Linux's /proc: memory, peaks, CPU time, children."""

from __future__ import annotations

import contextlib
import os
import time
from typing import NamedTuple

from optuna_quota._metering.process_tree import ProcessMemory


# The most bytes of anonymous memory that a page fault adds in pages of 4 KiB. Files' pages come 16
# or more at a time, anonymous huge pages 512.
_SMALL_FAULT = 8 * 2**10
_HUGE_PAGE = 2 * 2**20
# Share of a growth with few page faults that huge pages must account for.
_HUGE_SHARE = 0.5
# Share of the memory by which the resident pages of files may have changed meanwhile.
_MAX_FILE_CHANGE = 0.1
# Share of the high-water mark within which the present memory is the peak itself.
_AT_PEAK = 0.01

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class MemorySnapshot(NamedTuple):
    """What the kernel reports of a process at one moment, in bytes."""

    highest: int  # The high-water mark of resident memory (VmHWM), with pages of files
    resident: int  # The resident memory
    anonymous: int  # The part of it that is neither of files nor shared memory
    file: int  # The resident pages of files
    most_file: int  # The most of them since the snapshot before
    faults: int  # The number of page faults so far
    huge: int  # The anonymous huge pages that this host has allocated so far, for any process


def unseen_peak(before: MemorySnapshot, now: MemorySnapshot) -> int | None:
    """Return the memory, without files' pages, at a peak between two snapshots (pure).

    The high-water mark includes pages of files, in an unknown share. So it is used only if page
    faults and huge pages account for the growth: a file that is mapped, read and unmapped causes
    few page faults and no anonymous huge pages.

    Returns:
        The bytes; None without a peak, or if it is unknown.
    """
    if now.highest <= before.highest or now.highest - now.resident <= _AT_PEAK * now.highest:
        return None
    peak = now.highest - max(before.file, now.most_file)
    if now.most_file - min(before.file, now.file) > _MAX_FILE_CHANGE * peak:
        return None
    growth = now.highest - before.resident
    small = growth <= _SMALL_FAULT * (now.faults - before.faults)
    huge = now.huge - before.huge >= _HUGE_SHARE * growth
    return peak if small or huge else None


def read_huge_pages() -> int:
    """Return the bytes of anonymous huge pages that this host has allocated, 0 if unknown."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb", buffering=0) as file:
        _, found, rest = file.read(1 << 16).partition(b"\nthp_fault_alloc ")
        return int(rest.split(None, 1)[0]) * _HUGE_PAGE if found else 0
    return 0


class LinuxProcess:
    """One process by its open directory in /proc.

    A descriptor stays bound to its process: once that is gone, reading raises OSError, even if the
    pid is reused.

    Raises:
        ProcessLookupError: If there is no such process (any more).
        OSError: If /proc can't be read.
    """

    def __init__(self, pid: int, parent: LinuxProcess | None = None) -> None:
        self.pid = pid
        self.parent = parent  # The process that it was found under, None for a root
        self.knows_peak = False  # Whether the kernel's peak began no earlier than the metering
        # The sizes that its memory was last computed from, as the kernel writes them.
        self.statm = b""
        self.shareable = 0  # The part of its memory, as last read, that is shared memory, in bytes
        self._shared, self._swapped = b"", 0
        self._swaps = has_swap()
        self.last: MemorySnapshot | None = None  # The snapshot that peaks are found since
        self._most_file = 0  # Since then
        self._folder = self._stat = self._statm = self._status = -1
        try:
            self._folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
            self._statm = self._open("statm")
            self._stat = self._open("stat")
            self._status = self._open("status")
            # Seconds from the boot to its creation, to a clock tick (10 ms).
            self.started = int(self._stat_fields()[19]) / _TICKS
        except FileNotFoundError as error:
            self.close()
            raise ProcessLookupError(f"There is no process {pid}.") from error
        except OSError:
            self.close()
            raise

    def memory(self) -> int:
        """Return the anonymous, shared and swapped bytes; 0 for a zombie.

        Shared pages count in full. statm gives the anonymous part (0.6 µs), but adds shared memory
        to files: status (3 µs) is read when that sum has changed.
        """
        self.statm = os.pread(self._statm, 128, 0)
        _, resident, shared, _ = self.statm.split(b" ", 3)
        if self._swaps or shared != self._shared:
            self._update_shared(self._read_status())
            self._shared = shared
        return (int(resident) - int(shared)) * PAGE + self.shareable + self._swapped

    def proportional_memory(self) -> ProcessMemory:
        """Return its memory with each page divided by its holders; takes 0.1 to 1.4 ms.

        A zombie has none. Of another user's process, which can't be read, all pages count in full.
        """
        status = self._read_status()
        shmem = _size(status, b"RssShmem:")
        held = _size(status, b"RssAnon:") + shmem + _size(status, b"VmSwap:")
        try:
            rollup = self._read("smaps_rollup")
        except OSError:
            # Where it has ended since then, what was read has pages in full that others hold too.
            has_ended = b"VmRSS:" not in self._read_status()
            return ProcessMemory(0, 0) if has_ended else ProcessMemory(held, held, shmem)
        if b"Pss_Anon:" not in rollup:  # before Linux 5.4
            return ProcessMemory(held, min(held, _size(rollup, b"Pss:") or held), shmem)
        # From the same read as what is divided: what is added in between is not shared.
        whole = _size(rollup, b"Anonymous:")
        held = whole + shmem + _size(rollup, b"Swap:")
        anonymous, divided = _size(rollup, b"Pss_Anon:"), _size(rollup, b"Pss_Shmem:")
        # Dirty pages with another holder are anonymous ones and shared memory; of the latter
        # there is at most twice what dividing has taken off.
        common = _size(rollup, b"Shared_Dirty:") - min(shmem, 2 * max(0, shmem - divided))
        common = max(0, min(common, whole))
        return ProcessMemory(
            held=held,
            proportional=anonymous + divided + _size(rollup, b"SwapPss:"),
            shareable=shmem,
            common=common,
            common_part=max(0, anonymous - (whole - common)),
            shareable_part=divided,
        )

    def snapshot(self, huge: int) -> MemorySnapshot | None:
        """Return its memory, given the host's huge pages so far; None if it has ended."""
        status = self._read_status()
        if b"VmHWM:" not in status:
            return None
        self._update_shared(status)
        return MemorySnapshot(
            highest=_size(status, b"VmHWM:"),
            resident=_size(status, b"VmRSS:"),
            anonymous=_size(status, b"RssAnon:"),
            file=_size(status, b"RssFile:"),
            most_file=self._most_file,
            faults=self.faults(),
            huge=huge,
        )

    def unseen_peak(self, huge: int) -> int | None:
        """Return a peak since the last call, in bytes, given the host's huge pages so far."""
        now = self.snapshot(huge)
        if now is None:
            return None
        found = self.unseen_peak_at(now)
        self.last, self._most_file = now, now.file
        return found

    def unseen_peak_at(self, now: MemorySnapshot) -> int | None:
        """Return a peak between the last call of ``unseen_peak`` and a snapshot, in bytes."""
        if self.last is None:
            return None
        most_file = max(self._most_file, now.most_file)
        return unseen_peak(self.last, now._replace(most_file=most_file))

    def faults(self) -> int:
        fields = self._stat_fields()
        return int(fields[7]) + int(fields[9])

    def times(self) -> tuple[float, float]:
        """Return the CPU-seconds of its own and of its reaped children."""
        if self.pid == os.getpid():
            import resource

            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            return time.process_time(), children.ru_utime + children.ru_stime
        fields = self._stat_fields()
        utime, stime, cutime, cstime = (int(value) / _TICKS for value in fields[11:15])
        own = utime + stime
        if self.parent is None:
            # To the nanosecond, where /proc counts in ticks of 10 ms. The clock's id is what
            # clock_getcpuclockid(3) makes of a pid. A pid may be reused, so only a root is asked,
            # right after its descriptor proved it alive.
            with contextlib.suppress(OSError):
                own = max(own, time.clock_gettime(~self.pid << 3 | 2))
        return own, cutime + cstime

    def parent_pid(self) -> int:
        return int(self._stat_fields()[1])

    def children(self) -> set[int]:
        """Return the pids of the children of all its threads, none if it is gone."""
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
        """Restart the peak; needs no privilege for this process and its children.

        Writing 5 to clear_refs sets the high-water mark to the present memory, see proc(5). Other
        readers of the process's VmHWM or ru_maxrss see it reset as well.
        """
        self.knows_peak, self.last = False, None
        with contextlib.suppress(OSError):
            handle = os.open("clear_refs", os.O_WRONLY, dir_fd=self._folder)
            try:
                os.write(handle, b"5")
                self.knows_peak = True
            finally:
                os.close(handle)

    def close(self) -> None:
        # Forgotten first: after an interrupt in between, a second call would close other files.
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

    def _update_shared(self, status: bytes) -> None:
        self.shareable = _size(status, b"RssShmem:")
        self._swapped = _size(status, b"VmSwap:")
        self._most_file = max(self._most_file, _size(status, b"RssFile:"))

    def _read_status(self) -> bytes:
        """Return the text of status; for a zombie it lacks the sizes of memory."""
        return os.pread(self._status, 4096, 0)

    def _stat_fields(self) -> list[bytes]:
        """Return the fields of stat from the third on."""
        # The name, in parentheses, may contain parentheses too; numbers follow the last one.
        return os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()


def has_swap() -> bool:
    try:
        with open("/proc/swaps", "rb") as file:
            return len(file.read().splitlines()) > 1
    except OSError:
        return True


def _size(text: bytes, name: bytes) -> int:
    """Return the bytes of a line of that name, with its colon; 0 without one."""
    at = text.find(name)
    if at < 0:
        return 0
    at += len(name)
    return int(text[at : at + 24].split(None, 1)[0]) * 1024
