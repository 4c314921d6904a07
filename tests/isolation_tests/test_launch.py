"""Trials on systems other than Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated, Limits, QuotaPruner, TrialCrashed
from optuna_quota._isolation import launch, linux, messages
from optuna_quota._isolation.channel import channel_pair
from optuna_quota._records import read_record


@pytest.mark.slow
def test_trials_without_a_linux_supervisor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linux, "can_supervise", lambda: False)

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.report(x, 0)
        print("here")  # noqa: T201
        if trial.number == 1:
            os._exit(3)
        if trial.number == 2:
            time.sleep(60)
        return x

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="15s")))
    study.optimize(isolated(objective), n_trials=2, catch=(TrialCrashed,))
    study.pruner = QuotaPruner(limits=Limits(wall_time="2s"))
    study.optimize(isolated(objective, grace_period=1.0), n_trials=1)
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED]
    usage = read_record(study.trials[0]).usage
    assert usage.memory is not None and usage.memory > 5e6 and usage.cpu_time is not None
    assert "exit code 3" in (read_record(study.trials[1]).reason or "")
    assert read_record(study.trials[2]).outcome == "terminated"
    assert capsys.readouterr().out.startswith("here\nhere\n")


def test_a_thread_that_supervises_and_fails_leaves_no_study_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise OSError("on purpose")

    monkeypatch.setattr(launch._PortableSupervisor, "_find_descendants", fail)
    control, commands = channel_pair()
    with contextlib.closing(control), subprocess.Popen(["sleep", "600"]) as process:
        with pytest.raises(OSError, match="on purpose"):
            launch._PortableSupervisor(process, commands).run()
        assert control.receive() == messages.ProcessStarted()
        with pytest.raises(EOFError):
            control.receive()
