"""What is concluded from one reading of a GPU device and another."""

from __future__ import annotations

import os

import pytest

from optuna_quota._metering.gpu_reader import DeviceReading, growth, has_process


# A pid that no process of this machine has.
HOST_PID = 4190000


def test_growth_excludes_foreign_processes() -> None:
    before = DeviceReading(used=10.0, total=100.0, held={1: 6.0, 2: None})
    now = DeviceReading(used=30.0, total=100.0, held={1: 8.0, 2: None, 3: 11.0})
    assert growth(before, now, lambda pid: pid == 1) == 18.0
    assert growth(before, now, lambda pid: True) == 7.0
    assert growth(before, DeviceReading(), lambda pid: True) is None
    # A device holds no less than what it lists.
    assert (
        growth(DeviceReading(used=0.0), DeviceReading(used=0.0, held={3: 9.0}), lambda p: False)
        == 9.0
    )


def test_another_users_process_is_alive_though_proc_may_hide_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill(pid: int, number: int) -> None:
        raise {1: PermissionError, 2: ProcessLookupError}[pid]

    assert has_process(os.getpid())
    assert not has_process(HOST_PID)
    assert not has_process(2**32 - 1)
    monkeypatch.setattr(os, "kill", kill)
    assert has_process(1)
    assert not has_process(2)


def test_hidden_use_is_held_by_processes_that_are_not_listed() -> None:
    assert DeviceReading(used=60e9, total=80e9).has_hidden_use
    assert not DeviceReading(used=60e9, total=80e9, held={1: 59e9}).has_hidden_use
    assert not DeviceReading().has_hidden_use
