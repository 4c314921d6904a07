"""Isolated trials do all that trials do in process."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
from datetime import timedelta
import functools
import multiprocessing
import os
from pathlib import Path
import queue
import sys
import threading
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import check, isolated, LimitBreached, Limits, QuotaPruner, TrialCrashed
from optuna_quota._records import read_record


optuna.logging.set_verbosity(optuna.logging.WARNING)


def quadratic(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, trial: optuna.Trial) -> float:
        return self.factor * quadratic(trial)

    def method(self, trial: optuna.Trial) -> float:
        return self.factor * quadratic(trial)


@pytest.mark.slow
def test_any_callable_runs_in_another_process() -> None:
    offset = 3.0
    objectives: list[Callable[..., Any]] = [
        quadratic,
        lambda trial: trial.suggest_float("x", 0, 1) + offset,
        Scaled(2.0),
        Scaled(2.0).method,
        functools.partial(lambda shift, trial: quadratic(trial) + shift, 1.0),
    ]
    for objective in objectives:
        study = optuna.create_study()
        study.optimize(isolated(objective), n_trials=2)
        assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
        record = read_record(study.trials[0])
        assert record.isolation == "process"
        assert record.outcome == "completed"
        assert record.usage.memory is not None and record.usage.memory > 5e6


def test_a_process_with_many_open_files_and_more_memory_than_a_trial_may_use() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, before[1]), before[1]))
    held = b"1" * (60 << 20)
    try:
        with contextlib.ExitStack() as files:
            for _ in range(1100):
                files.enter_context(open(os.devnull))
            study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="50MiB")))
            study.optimize(isolated(lambda _: held[0], start_method="fork"), n_trials=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert study.trials[0].state == TrialState.COMPLETE


def test_the_objective_runs_elsewhere() -> None:
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: os.getpid()), n_trials=2)
    pids = {trial.value for trial in study.trials}
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize(
    "start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow), "fork"]
)
def test_each_start_method(start_method: Any) -> None:
    study = optuna.create_study()
    study.optimize(isolated(quadratic, start_method=start_method), n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2


def test_a_trial_does_all_that_a_trial_does() -> None:
    def objective(trial: optuna.Trial) -> float:
        assert isinstance(trial, optuna.Trial)
        x = trial.suggest_float("x", 0, 1)
        assert trial.suggest_int("n", 1, 3, log=True) in (1, 2, 3)
        assert trial.suggest_categorical("c", ["a", None]) in ("a", None)
        assert trial.params["x"] == x and set(trial.distributions) == {"x", "n", "c"}
        trial.set_user_attr("note", {"a": [1, 2]})
        assert trial.user_attrs["note"] == {"a": [1, 2]}
        if hasattr(optuna.Trial, "set_constraint"):  # Optuna 4 has none.
            trial.set_constraint("room", -1.0)
            assert trial.constraints == {"room": -1.0}
        for step in range(3):
            trial.report(x + step, step)
            assert not trial.should_prune()
        assert trial.number == 0 and trial.datetime_start is not None
        assert trial.relative_params == {}
        assert trial.study.direction == optuna.study.StudyDirection.MINIMIZE
        assert isinstance(trial.study, optuna.Study)
        assert len(trial.study.trials) == 1
        trial.study.set_user_attr("seen", True)
        trial.storage.set_trial_system_attr(trial._trial_id, "ours:key", 5)
        return x

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(isolated(objective), n_trials=1)
    (trial,) = study.trials
    assert trial.intermediate_values.keys() == {0, 1, 2}
    assert trial.user_attrs["note"] == {"a": [1, 2]}
    assert trial.system_attrs["ours:key"] == 5
    if hasattr(optuna.Trial, "set_constraint"):
        assert trial.constraints == {"room": -1.0}
    assert study.user_attrs["seen"] is True


def test_a_study_in_a_closure_is_the_same_study() -> None:
    study = optuna.create_study()

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            study.stop()
        return float(len(study.trials))

    study.optimize(isolated(objective), n_trials=10)
    assert [t.value for t in study.trials] == [1.0, 2.0, 3.0]


def test_errors_come_back_with_their_type_and_traceback() -> None:
    class OddError(Exception):
        def __init__(self, code: int, *, detail: str) -> None:
            super().__init__(f"odd {code}")
            self.detail = detail

    def fail_deep_inside() -> None:
        try:
            {}["missing"]
        except KeyError as error:
            raise OddError(7, detail="why") from error

    def objective(trial: optuna.Trial) -> float:
        fail_deep_inside()
        return 0.0

    study = optuna.create_study()
    with pytest.raises(OddError, match="odd 7") as caught:
        study.optimize(isolated(objective), n_trials=1)
    assert caught.value.detail == "why"
    assert isinstance(caught.value.__cause__, KeyError)
    assert "fail_deep_inside" in [entry.name for entry in caught.traceback]
    assert study.trials[0].state == TrialState.FAIL
    assert read_record(study.trials[0]).reason == "The objective raised OddError: odd 7."
    study.optimize(isolated(objective), n_trials=2, catch=(OddError,))
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 3


def test_an_error_whose_class_only_the_trial_finds(tmp_path: Path) -> None:
    def objective(trial: optuna.Trial) -> float:
        sys.path.insert(0, str(tmp_path))
        from hidden_module import Hidden  # type: ignore[import-not-found]  # written below

        raise Hidden("the reason")

    (tmp_path / "hidden_module.py").write_text("class Hidden(ValueError): pass\n")
    with pytest.raises(ValueError, match="Hidden: the reason"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)


def test_check_asks_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        try:
            while True:
                check(trial)
        except LimitBreached as error:
            time.sleep(0.3)  # the polite stop comes, and does not raise once more
            trial.set_user_attr("resource", str(error.resource))
            raise

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=1)))
    study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].user_attrs["resource"] == "wall_time"


def test_pruning_by_the_objective() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.report(1.5, 0)
        raise optuna.TrialPruned("enough")

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED and trial.value == 1.5
    assert read_record(trial).outcome == "pruned"


def test_pruning_by_a_pruner() -> None:
    def objective(trial: optuna.Trial) -> float:
        for step in range(5):
            trial.report(float(trial.number), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(trial.number)

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    study.optimize(isolated(objective), n_trials=3)
    assert [t.state for t in study.trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.PRUNED,
    ]


def test_several_objectives_and_ask_and_tell() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        return x, 1 - x

    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(isolated(objective), n_trials=2)
    trial = study.ask()
    study.tell(trial, isolated(objective)(trial))
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    with pytest.raises(NotImplementedError):
        study.optimize(isolated(lambda trial: trial.report(1.0, 0)), n_trials=1)


def test_threads_run_one_trial_each() -> None:
    study = optuna.create_study()
    study.optimize(isolated(quadratic), n_trials=8, n_jobs=3)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 8


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "journal"])
def test_storages(tmp_path: Any, backend: str) -> None:
    if backend == "sqlite":
        storage: Any = f"sqlite:///{tmp_path}/study.db"
    else:
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
        )

    def objective(trial: optuna.Trial) -> float:
        trial.report(1.0, 0)
        return quadratic(trial)

    study = optuna.create_study(storage=storage)
    study.optimize(isolated(objective), n_trials=2)
    assert all(t.intermediate_values == {0: 1.0} for t in study.trials)


def test_a_fixed_trial() -> None:
    trial = optuna.trial.FixedTrial({"x": 0.5})
    assert isolated(quadratic)(trial) == 0.25


def test_memory_breach_ends_the_trial_and_the_study_goes_on() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.report(0.5, 0)
        if trial.number == 0:
            held = []
            while True:
                held.append(bytearray(2**22))
        return 1.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(memory="200MiB")))
    study.optimize(isolated(objective), n_trials=2)
    terminated, completed = study.trials
    record = read_record(terminated)
    assert terminated.state == TrialState.PRUNED and completed.state == TrialState.COMPLETE
    assert record.outcome == "terminated"
    assert record.breach is not None and record.breach.resource == "memory"
    assert record.usage.memory is not None and record.usage.memory > 150 * 2**20
    assert terminated.intermediate_values == {0: 0.5}


def test_a_sleeping_trial_is_stopped_politely() -> None:
    def objective(trial: optuna.Trial) -> float:
        import time

        try:
            time.sleep(60)
        except LimitBreached as error:
            trial.set_user_attr("checkpoint", str(error.resource))
            raise
        return 0.0

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=0.5)))
    study.optimize(isolated(objective, grace_period=10.0), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["checkpoint"] == "wall_time"
    assert read_record(trial).outcome == "terminated"


def test_limits_that_disagree_are_an_error() -> None:
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="5s")))
    with pytest.raises(ValueError, match="must agree"):
        study.optimize(isolated(quadratic, limits=Limits(wall_time="6s")), n_trials=1)
    study.optimize(isolated(quadratic, limits=Limits(wall_time="5s")), n_trials=1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"grace_period": -1}, ValueError),
        ({"grace_period": float("nan")}, ValueError),
        ({"grace_period": "5"}, ValueError),
        ({"grace_period": None}, TypeError),
        ({"start_method": "threads"}, ValueError),
        ({"limits": {"memory": 1}}, TypeError),
        ({"strict_memory": "1GiB"}, TypeError),
        ({"predictive_stop": 1}, TypeError),
        ({"preload": 1}, TypeError),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        isolated(quadratic, **arguments)
    with pytest.raises(TypeError):
        isolated(5)  # type: ignore[arg-type]  # wrong on purpose


def test_a_grace_period_has_a_unit_or_is_a_timedelta() -> None:
    assert isolated(quadratic, grace_period="1m").options.grace_period == 60
    assert isolated(quadratic, grace_period=timedelta(seconds=2)).options.grace_period == 2


def test_an_objective_that_cannot_be_pickled_says_so() -> None:
    lock = threading.Lock()
    study = optuna.create_study()
    with pytest.raises(
        TypeError, match="can't be sent to the trial's process because `lock` that"
    ):
        study.optimize(isolated(lambda trial: float(lock.locked())), n_trials=1)
    study.optimize(isolated(lambda trial: float(lock.locked()), start_method="fork"), n_trials=1)
    assert study.trials[1].value == 0.0


def test_a_library_of_ctypes_is_refused_by_its_name() -> None:
    library = ctypes.CDLL(None)
    with pytest.raises(TypeError, match="`library` that it refers to can't be pickled"):
        optuna.create_study().optimize(isolated(lambda trial: library.abs(-1)), n_trials=1)


class Loadable(ctypes.CDLL):
    def __reduce__(self) -> tuple[Any, ...]:
        return Loadable, (None,)


def test_a_library_that_can_be_pickled_is_sent() -> None:
    library = Loadable(None)
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: float(library.abs(-1))), n_trials=1)
    assert study.best_value == 1.0


def test_an_object_that_can_only_be_sent_is_not_named_beside_one_that_cannot() -> None:
    good, bad = multiprocessing.get_context("spawn").Lock(), threading.Lock()
    with pytest.raises(TypeError, match="because `bad` that it refers to"):
        optuna.create_study().optimize(
            isolated(lambda trial: float(bool(good) and bad.locked())), n_trials=1
        )


def test_a_queue_between_threads_is_not_copied() -> None:
    gpus: queue.Queue[int] = queue.Queue()
    with pytest.raises(TypeError, match=r"queue\.Queue"):
        optuna.create_study().optimize(isolated(lambda trial: float(gpus.get())), n_trials=1)


def test_a_value_that_cannot_be_sent_is_a_crash() -> None:
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="type generator"):
        study.optimize(isolated(lambda trial: (x for x in ()), on_crash="raise"), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
