"""A crash fails its trial, not the study; a study in which all trials crash ends."""

from __future__ import annotations

from collections.abc import Callable
import logging
import os
from pathlib import Path
import signal
import sys
import time
import types
from typing import Any
from unittest.mock import Mock
import warnings

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, TrialCrashed
from optuna_quota._isolation import launch, outcome
from optuna_quota._isolation.messages import ExitReport
from optuna_quota._isolation.out_of_memory import find_breach_at_exit, GpuMemoryState
from optuna_quota._isolation.outcome import (
    CrashStatus,
    describe_crash_series,
    describe_exit,
    OutcomeResolver,
)
from optuna_quota._records import CRASHED, read_record
from tests.isolation_tests.trials import needs_supervisor, run_one


pytestmark = needs_supervisor


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def leave_politely() -> None:
    sys.exit("no more")


def crash_at(*numbers: int, how: Callable[[], None] = leave) -> Callable[[optuna.Trial], float]:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number in numbers:
            how()
        return float(trial.number)

    return objective


def states_of(study: optuna.Study) -> str:
    return "".join(trial.state.name[0] for trial in study.trials)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["plain", "quota"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (be_killed, "killed from outside (SIGKILL)"),
        (leave, "exit code 3"),
        (leave_politely, "sys.exit('no more')"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_optimize_goes_on_after_a_crash(
    sampler: str, how: Callable[[], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[tuple[int, TrialState]] = []
    quota = QuotaSampler(quota=Quota(n_trials=9)) if sampler == "quota" else None
    study = optuna.create_study(sampler=quota)
    optuna.logging.enable_propagation()
    try:
        study.optimize(
            isolated(crash_at(1, how=how)),
            n_trials=4,
            callbacks=[lambda study, trial: ended.append((trial.number, trial.state))],
        )
    finally:
        optuna.logging.disable_propagation()
    assert states_of(study) == "CFCC"
    assert ended == [(trial.number, trial.state) for trial in study.trials]
    record = read_record(study.trials[1])
    assert record.outcome == "failed" and record.reason is not None and words in record.reason
    assert record.usage.wall_time is not None
    # The log of Optuna gives the reason, and no other one.
    said = dict.fromkeys(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert [words in line for line in said] == [True, False]
    assert "The value nan (the " in next(iter(said)) and "Trial 1 failed with value nan." in said


def test_a_value_that_cannot_be_sent_is_a_crash_like_others() -> None:
    def objective(trial: optuna.Trial) -> Any:
        return (x for x in ()) if trial.number == 0 else 1.0

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=2)
    assert states_of(study) == "FC"
    assert "type generator" in (read_record(study.trials[0]).reason or "")


ONLY_IN_TRIALS = "class Loss:\n    pass\nclass Odd(UserWarning):\n    pass\n"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["result", "attribute", "warning"])
def test_a_class_that_only_the_trial_can_load(
    way: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "only_in_trials.py").write_text(ONLY_IN_TRIALS)
    folder = str(tmp_path)

    def objective(trial: optuna.Trial) -> float:
        if trial.number != 1:
            return 1.0
        sys.path.insert(0, folder)
        from only_in_trials import Loss, Odd  # type: ignore[import-not-found]

        if way == "attribute":
            trial.set_user_attr("loss", Loss())
        elif way == "warning":
            warnings.warn("not today", Odd, stacklevel=1)
            return 2.0
        return Loss()  # type: ignore[no-any-return]

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=3)
    if way == "warning":
        assert states_of(study) == "CCC"
        assert [str(w.message) for w in recwarn if w.category is UserWarning] == ["Odd: not today"]
        return
    assert states_of(study) == "CFC"
    assert "only_in_trials.Loss (ModuleNotFoundError" in (
        read_record(study.trials[1]).reason or ""
    )


def test_a_crash_of_a_study_with_two_objectives() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        if trial.number == 1:
            os._exit(3)
        return 1.0, 2.0

    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(isolated(objective), n_trials=3)
    assert states_of(study) == "CFC"
    assert "exit code 3" in (read_record(study.trials[1]).reason or "")


@pytest.mark.slow
def test_crashes_in_threads() -> None:
    study = optuna.create_study()
    study.optimize(isolated(crash_at(2, 5)), n_trials=8, n_jobs=3)
    assert states_of(study) == "CCFCCFCC"


@pytest.mark.slow
def test_a_wrapper_may_compute_with_the_value_of_a_crash() -> None:
    inner = isolated(crash_at(1))
    study = optuna.create_study()
    study.optimize(lambda trial: -inner(trial), n_trials=3)
    assert states_of(study) == "CFC"


@pytest.mark.slow
def test_on_crash_may_raise() -> None:
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="exit code 3") as caught:
        study.optimize(isolated(crash_at(1), on_crash="raise"), n_trials=4)
    assert caught.value.exitcode == 3
    assert states_of(study) == "CF"
    study.optimize(isolated(crash_at(3), on_crash="raise"), n_trials=3, catch=(TrialCrashed,))
    assert states_of(study) == "CFCFC"


def test_a_crash_outside_of_optimize_raises() -> None:
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="exit code 3"):
        isolated(crash_at(0))(study.ask())

    def objective(trial: optuna.Trial) -> float:
        inner = isolated(crash_at(2))
        with pytest.raises(TrialCrashed, match="exit code 3"):
            inner(study.ask())
        return 1.0

    study.optimize(objective, n_trials=1)
    assert study.trials[1].value == 1.0


def test_errors_of_the_objective_are_raised() -> None:
    def objective(trial: optuna.Trial) -> float:
        raise ZeroDivisionError("mine")

    study = optuna.create_study()
    with pytest.raises(ZeroDivisionError, match="mine"):
        study.optimize(isolated(objective), n_trials=4)
    assert states_of(study) == "F"
    assert CRASHED not in study.trials[0].system_attrs


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["plain", "quota"])
def test_a_study_ends_when_its_first_trials_have_all_crashed(sampler: str) -> None:
    quota = QuotaSampler(quota=Quota(n_trials=9)) if sampler == "quota" else None
    study = optuna.create_study(sampler=quota)
    with pytest.raises(TrialCrashed, match="first 3 trials .*exit code 3.*catch=") as caught:
        study.optimize(isolated(crash_at(*range(9))), n_trials=9)
    assert caught.value.exitcode == 3
    assert states_of(study) == "FFF"
    reason = read_record(study.trials[2]).reason
    assert reason == "The trial's process ended by itself with exit code 3."


@pytest.mark.slow
def test_a_study_ends_when_trials_in_a_row_have_crashed() -> None:
    study = optuna.create_study()
    crashing = isolated(crash_at(2, 3, 4, 5, 7, 8, 9, 10, 11, 12))
    with pytest.raises(TrialCrashed, match="5 trials in a row .*trial 11: "):
        study.optimize(crashing, n_trials=20)
    assert states_of(study) == "CCFFFFCFFFFF"


@pytest.mark.slow
def test_crashes_are_counted_over_the_rows_of_the_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for number in range(2):
        study = optuna.create_study(storage=url, study_name="s", load_if_exists=True)
        study.optimize(isolated(crash_at(number)), n_trials=1)
    study = optuna.load_study(storage=url, study_name="s")
    with pytest.raises(TrialCrashed, match="first 3 trials"):
        study.optimize(isolated(crash_at(2)), n_trials=1)
    # Once the objective is fixed, the study continues.
    study.optimize(isolated(crash_at(4)), n_trials=3)
    assert states_of(study) == "FFFCFC"


@pytest.mark.slow
def test_a_study_that_catches_crashes_continues() -> None:
    study = optuna.create_study()
    study.optimize(isolated(crash_at(*range(4))), n_trials=4, catch=(TrialCrashed,))
    assert states_of(study) == "FFFF"


def test_a_retried_trial_does_not_count_as_crashed() -> None:
    study = optuna.create_study()
    study.optimize(isolated(crash_at(0, 1)), n_trials=2)
    crashed = study.trials[0]
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL, system_attrs=crashed.system_attrs, params={}, distributions={}
        )
    )
    study.optimize(isolated(crash_at(3)), n_trials=1)
    assert states_of(study) == "FFFF"


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ("x", None),
        ("xx", None),
        ("xxx", "The first 3 trials of the study have crashed"),
        ("xxxx", "The first 4 trials of the study have crashed"),
        ("xx.x", None),
        ("xxx.", None),  # one has ended well meanwhile
        ("xxx-", "The first 3 trials of the study have crashed"),
        ("xx-x", None),  # the third may yet end well
        (".xxxx", None),
        (".xxxxx", "5 trials in a row have crashed"),
        ("-xxxxx", "5 trials in a row have crashed"),
        (".xx-xxx", None),
    ],
)
def test_crash_series(statuses: str, words: str | None) -> None:
    names: dict[str, CrashStatus] = {"x": "crashed", ".": "ended", "-": "running"}
    found = {
        describe_crash_series([names[status] for status in statuses], index)
        for index, status in enumerate(statuses)
        if status == "x"
    }
    assert found == {words} or (words is None and found == {None})


def test_a_trial_that_never_began_has_used_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("No process today.")

    monkeypatch.setattr(
        "optuna_quota._isolation.forkserver_client.ForkServerClient.launch", refuse
    )
    trial = run_one(lambda trial: 1.0, Limits(wall_time="1h"))
    record = read_record(trial)
    assert record.outcome == "failed" and "No process today" in (record.reason or "")
    # Neither this process's memory nor that of its fork server.
    assert record.usage.memory is None and record.isolation == "process"


def test_a_fork_that_is_refused_fails_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(launch, "fork_trial", refuse)
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: 1.0, start_method="fork"), n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "failed" and "could not be started" in (record.reason or "")


def test_a_storage_error_when_a_trial_is_to_run_again_ends_no_study(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("The storage is full.")

    study = optuna.create_study()
    trial = study.ask()
    monitor = Mock(environment={"CUDA_VISIBLE_DEVICES": "GPU-0"})
    resolver = OutcomeResolver(trial, study, monitor, Mock(on_crash="fail"))
    monkeypatch.setattr(outcome, "free_memory", lambda _: [1e9])
    monkeypatch.setattr(study, "get_trials", fail)
    resolver._try_again_elsewhere(GpuMemoryState(requested=1e8))
    assert len(study._storage.get_all_trials(study._study_id)) == 1


# Why a trial's process ended: as text, and as a breach.


MIB = 2**20
GIB = 2**30


LIMITS = {"memory": (1.0 * GIB, False), "cpu_time": (10.0, True)}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (ExitReport(-signal.SIGSEGV), "segmentation fault"),
        (ExitReport(-signal.SIGBUS), "where /dev/shm or a disk is full"),
        (ExitReport(-signal.SIGKILL), "from outside"),
        (ExitReport(-signal.SIGKILL, oom_kills=1, memory=GIB), "out-of-memory killer"),
        (ExitReport(-signal.SIGKILL, "stopped"), "SIGSTOP"),
        (ExitReport(-signal.SIGKILL, "request"), "interrupted"),
        (ExitReport(0), "before it gave a result"),
        (ExitReport(7), "exit code 7"),
        (ExitReport(None), "killed from outside"),
        (ExitReport(-200), "signal 200"),
    ],
)
def test_every_exit_is_described(ended: ExitReport, words: str) -> None:
    assert words in describe_exit(ended)
    assert describe_exit(ended).endswith(".")


@pytest.mark.parametrize(
    ("ended", "strict", "resource"),
    [
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), True, "memory"),
        # No allocation is refused when memory is measured.
        (ExitReport(-signal.SIGABRT, memory=0.97 * GIB), False, None),
        (ExitReport(-signal.SIGKILL, memory=0.97 * GIB, oom_kills=1), True, None),
        (ExitReport(None, memory=0.97 * GIB, stuck="It hangs."), True, None),
        (ExitReport(-signal.SIGABRT, memory=1.01 * GIB), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, cgroup_oom_kills=1), False, "memory"),
        (ExitReport(-signal.SIGKILL, memory=0.5 * GIB, oom_kills=1), False, None),
        (ExitReport(-signal.SIGXCPU, cpu_time=9.9), False, "cpu_time"),
        (ExitReport(1, cpu_time=9.9), False, None),
        (ExitReport(1), False, None),
    ],
)
def test_an_exit_at_a_limit_is_a_breach(
    ended: ExitReport, strict: bool, resource: str | None
) -> None:
    breach = find_breach_at_exit(ended, LIMITS, 5.0, strict_memory=strict)
    assert (None if breach is None else breach.resource) == resource
    if breach is not None:
        assert breach.observed > breach.limit


def use_fake_torch(trial: optuna.Trial) -> float:
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 1, max_memory_reserved=lambda _: 5
    )
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    return 2.0


@pytest.mark.parametrize("hangs", [False, True])
def test_a_reading_of_gpus_that_fails_at_the_end_loses_no_result(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(resolver: OutcomeResolver) -> None:
        asked.append(resolver)
        if hangs:  # until the limit on time has long had the trial killed
            time.sleep(2.0)
        raise RuntimeError("no reading")

    monkeypatch.setattr(OutcomeResolver, "measure_gpus", fail)
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=1.0)))
    study.optimize(isolated(use_fake_torch, grace_period=0.2), n_trials=1)
    assert asked and study.trials[0].value == 2.0
