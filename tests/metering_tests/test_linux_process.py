"""Which high-water marks are peaks of memory, and which may be files that were mapped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from optuna_quota._metering.linux_process import (
    LinuxProcess,
    MemorySnapshot,
    read_huge_pages,
    unseen_peak,
)


MIB = 2**20


def mark(
    highest: int,
    resident: int = 100,
    *,
    file: int = 40,
    most_file: int = 40,
    faults: int = 1000,
    huge: int = 0,
) -> MemorySnapshot:
    most = max(file, most_file) * MIB
    anonymous = (resident - file) * MIB
    return MemorySnapshot(
        highest * MIB, resident * MIB, anonymous, file * MIB, most, faults, huge * MIB
    )


BEFORE = mark(100)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (mark(100), None),  # nothing new
        (mark(400, 398, faults=90_000), None),  # it is as high now, and was looked at
        (mark(400, faults=78_000), 360),  # pages of 4 KiB, one by one
        (mark(400, faults=1_200, huge=300), 360),  # huge pages
        (mark(400, faults=5_800), None),  # 64 KiB a fault: a file
        (mark(400, faults=1_150), None),  # huge pages of a file
        (mark(400, faults=1_150, huge=20), None),
        # A file that came and went, beside other processes' huge pages.
        (mark(400, most_file=300, faults=1_150, huge=300), None),
        (
            mark(400, 220, file=160, faults=78_000),
            None,
        ),  # a file came meanwhile, and may have gone
        (mark(400, 110, file=50, faults=78_000), 350),
    ],
)
def test_peaks_by_the_high_water_mark(now: MemorySnapshot, expected: int | None) -> None:
    assert unseen_peak(BEFORE, now) == (None if expected is None else expected * MIB)


def test_huge_pages_of_this_host_are_counted() -> None:
    assert read_huge_pages() >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_after_an_interrupt_no_other_file_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    process, close = LinuxProcess(os.getpid()), os.close

    def interrupted(handle: int) -> None:
        close(handle)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.close()
    other = os.open(os.devnull, os.O_RDONLY)  # gets the number that was closed
    process.close()
    os.close(other)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_ends_while_it_is_read_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process, read = LinuxProcess(child.pid), LinuxProcess._read

        def read_once_it_has_ended(self: LinuxProcess, name: str) -> bytes:
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            return read(self, name)

        assert process.proportional_memory().held > 0
        monkeypatch.setattr(LinuxProcess, "_read", read_once_it_has_ended)
        assert process.proportional_memory().held == 0
        process.close()
    assert child.returncode == -signal.SIGKILL
