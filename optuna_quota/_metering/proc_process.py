"""One process by its open directory in Linux's /proc."""

from __future__ import annotations

import contextlib
import os
import time

from optuna_quota._metering.overlap import Share


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class ProcProcess:
    """One process by its open directory in /proc.

    A descriptor there stays bound to the process that it was opened for: when the number is
    reused, reading fails instead of showing a stranger.

    Args:
        pid: Its number.
        parent: The process that it was found under, None for a root.

    Attributes:
        started: Seconds from the boot to its creation, to a clock tick (10 ms).
        knows_peak: Whether the peak that the kernel keeps began no earlier than the metering.

    Raises:
        ProcessLookupError: If there is no such process (any more).
        OSError: If /proc can't be read.
    """

    __slots__ = (
        "_folder",
        "_stat",
        "_statm",
        "_status",
        "is_self",
        "knows_peak",
        "parent",
        "pid",
        "started",
    )

    def __init__(self, pid: int, parent: ProcProcess | None = None) -> None:
        self.pid = pid
        self.parent = parent
        self.is_self = pid == os.getpid()
        self.knows_peak = False
        self._folder = self._stat = self._statm = self._status = -1
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
        """Return the resident bytes; 0 for a zombie. Raises OSError when it is gone."""
        return int(os.pread(self._statm, 128, 0).split(b" ", 2)[1]) * _PAGE

    def share(self) -> Share:
        """Return what it holds, and what of it others hold too; costs about 1 ms a gigabyte.

        Nothing for a zombie; all as its own where it may not be asked (another user's).

        Raises:
            OSError: If it is gone.
        """
        try:
            rollup = _kilobytes(self._read("smaps_rollup"))
            status = _kilobytes(os.pread(self._status, 4096, 0))
        except OSError:
            # Of a zombie as well; what is gone altogether fails here too.
            resident = self.memory()
            return Share(resident, resident, resident, 0)
        private = rollup.get(b"Private_Clean", 0) + rollup.get(b"Private_Dirty", 0)
        if b"Pss_Anon" in rollup:
            divided = rollup[b"Pss_Anon"] + rollup.get(b"Pss_Shmem", 0)
            file = status.get(b"RssFile", 0)
        else:  # before Linux 5.4
            divided, file = rollup.get(b"Pss", 0), 0
        return Share(1024 * rollup.get(b"Rss", 0), 1024 * private, 1024 * divided, 1024 * file)

    def faulted(self) -> int:
        """Return the bytes of all pages that it has ever faulted in; raises OSError when gone."""
        fields = self._stat_fields()
        return (int(fields[7]) + int(fields[9])) * _PAGE

    def peak(self) -> int:
        """Return the highest resident bytes, 0 for a zombie. Raises OSError when it is gone."""
        status = os.pread(self._status, 4096, 0)
        at = status.find(b"VmHWM:")
        return int(status[at + 6 : at + 32].split(None, 1)[0]) * 1024 if at >= 0 else 0

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
        self.knows_peak = False
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

    def _stat_fields(self) -> list[bytes]:
        """Return the fields of stat from the third on."""
        # The name, in parentheses, may hold anything; what follows the last one is numbers.
        return os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()


def _kilobytes(text: bytes) -> dict[bytes, int]:
    """Return the amounts of a file of lines such as ``Pss:  123 kB``."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(b":")
        fields = rest.split()
        if len(fields) == 2 and fields[1] == b"kB":
            found[name] = int(fields[0])
    return found
