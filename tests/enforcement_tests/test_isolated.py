"""Isolated trials do all that trials do in process."""

from __future__ import annotations

from collections.abc import Callable
import functools
import logging
import os
import sys
from typing import Any
import warnings

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import check
from optuna_quota import isolated
from optuna_quota import LimitBreached
from optuna_quota import Limits
from optuna_quota import QuotaPruner
from optuna_quota import TrialCrashed
from optuna_quota._enforcement.isolation.template_client import template_client
from optuna_quota._enforcement.isolation.template_client import TemplateClient
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


def test_the_objective_runs_elsewhere() -> None:
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: os.getpid()), n_trials=2)
    pids = {trial.value for trial in study.trials}
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
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


def test_check_asks_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        import time

        check(trial)
        while True:
            try:
                time.sleep(0.05)
                check(trial)
            except LimitBreached as error:
                trial.set_user_attr("resource", str(error.resource))
                raise

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=0.3)))
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


def test_threads_of_the_parent_each_mind_one_child() -> None:
    study = optuna.create_study()
    study.optimize(isolated(quadratic), n_trials=8, n_jobs=3)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 8


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


def test_output_arrives_as_if_printed_here(capsys: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("to out", trial.number)  # noqa: T201
        print("to err", file=sys.stderr)  # noqa: T201
        sys.stdout.write("no newline")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    captured = capsys.readouterr()
    assert captured.out == "to out 0\nno newline"
    assert captured.err == "to err\n"


def test_output_of_children_goes_to_the_descriptors(capfd: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("from the trial", flush=True)  # noqa: T201
        os.system("echo from a shell")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    # The two come by different ways, as `sys.stdout` is not the descriptor under pytest.
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["from a shell", "from the trial"]


def test_logging_goes_to_the_handlers_here(caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> float:
        logger = logging.getLogger("mine.model")
        logger.debug("not asked for")
        logger.info("step %d", 3)
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("caught")
        return 0.0

    with caplog.at_level(logging.INFO, logger="mine"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    assert [r.getMessage() for r in caplog.records if r.name == "mine.model"] == [
        "step 3",
        "caught",
    ]
    assert "ValueError: inner" in caplog.text


def test_warnings_are_shown_here_and_filtered_as_here() -> None:
    def objective(trial: optuna.Trial) -> float:
        warnings.warn("take care", UserWarning, stacklevel=1)
        return 0.0

    with pytest.warns(UserWarning, match="take care"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="take care"):
            optuna.create_study().optimize(isolated(objective), n_trials=1)


def test_surroundings_are_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text("VALUE = 4.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN_VARIABLE", "here")

    def objective(trial: optuna.Trial) -> float:
        import own_module  # type: ignore[import-not-found]  # written above

        assert os.environ["OWN_VARIABLE"] == "here"
        assert os.path.samefile(os.getcwd(), str(tmp_path))
        return float(own_module.VALUE)

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 4.0


def test_random_numbers_differ_by_trial_and_follow_the_seed() -> None:
    import numpy as np

    def objective(trial: optuna.Trial) -> float:
        import random

        return float(np.random.random() + random.random())

    def values() -> list[float | None]:
        import random

        random.seed(3)
        np.random.seed(3)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(isolated(objective), n_trials=3)
        return [t.value for t in study.trials]

    first = values()
    assert len(set(first)) == 3
    assert values() == first


def test_the_template_loads_what_trials_import() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("loaded", "sklearn.linear_model" in sys.modules)
        return float(sklearn.LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]).coef_[0])

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=2)
    assert [round(t.value or 0.0, 6) for t in study.trials] == [1.0, 1.0]
    client = template_client()
    assert "sklearn.linear_model" in client._loaded
    assert not {name for name in client._unsafe if name.startswith(("sklearn", "scipy"))}


def test_the_template_loads_what_a_trial_had_imported_when_it_was_stopped(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else a trial whose imports take longer than its limit would never get further than them.
    (tmp_path / "slow_to_import.py").write_text(
        "import colorsys, os, time\nif os.getpid() != int(os.environ['QUICK']): time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("QUICK", str(os.getpid()))
    import slow_to_import  # type: ignore[import-not-found]

    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=1)))
    for _ in range(8):  # a crowded machine may not even start one in a second
        study.optimize(isolated(lambda trial: float(slow_to_import is None)), n_trials=1)
        if "colorsys" in template_client()._wanted:
            break
    assert "colorsys" in template_client()._wanted
    assert {read_record(t).outcome for t in study.trials} == {"terminated"}


def test_modules_that_start_threads_are_left_to_the_trials(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    client = template_client()
    client.want(["starts_a_thread"])
    try:
        study = optuna.create_study()
        study.optimize(isolated(quadratic), n_trials=2)
        assert len(study.trials) == 2
        assert "starts_a_thread" in client._unsafe
    finally:
        client._wanted.pop("starts_a_thread")


def test_a_package_full_of_threads_costs_one_template(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "full_of_threads"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "quiet.py").write_text("")
    for name in "abcd":
        (package / f"{name}.py").write_text(
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    client = TemplateClient()
    client.want(["full_of_threads", "full_of_threads.quiet"])
    client.want([f"full_of_threads.{name}" for name in "abcd"])
    try:
        client.launch(None).close()
        assert client._unsafe == {"full_of_threads.a"}
        assert {"full_of_threads", "full_of_threads.quiet"} <= client._loaded
        assert "full_of_threads.b" not in client._loaded
    finally:
        client.close()
        client._errors.close()


def test_threads_that_end_before_a_fork_are_no_danger() -> None:
    # scipy alone brings no OpenBLAS, many of its modules do.
    pytest.importorskip("scipy.special._ufuncs")
    client = TemplateClient()
    client.want(["scipy", "scipy.special._ufuncs", "scipy.special._basic"])
    try:
        client.launch(None).close()
        assert client._unsafe == set()
    finally:
        client.close()
        client._errors.close()


def test_what_a_template_said_is_heard_when_it_ends_before_all_was_sent() -> None:
    import pickle
    import socket

    from optuna_quota._enforcement.isolation.template import Unsafe
    from optuna_quota._enforcement.isolation.template_client import _rest

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(pickle.dumps(Unsafe("starts_threads")))
    theirs.close()
    with ours, pytest.raises(OSError):
        try:
            ours.send(b"too late")
        finally:
            assert pickle.loads(_rest(ours)) == Unsafe("starts_threads")
            assert _rest(ours) == b""


def test_a_template_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_quota._enforcement.isolation import template_client as module

    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    monkeypatch.setattr(module, "interpreter", lambda *_: command)
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="no luck today"):
        study.optimize(isolated(quadratic, start_method="spawn"), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


def test_a_fixed_trial_is_good_enough() -> None:
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
        ({"start_method": "threads"}, ValueError),
        ({"limits": {"memory": 1}}, TypeError),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        isolated(quadratic, **arguments)
    with pytest.raises(TypeError):
        isolated(5)  # type: ignore[arg-type]  # wrong on purpose


def test_an_objective_that_cannot_be_pickled_says_so() -> None:
    import threading

    lock = threading.Lock()
    study = optuna.create_study()
    with pytest.raises(TypeError, match="can't be sent to a process of its own"):
        study.optimize(isolated(lambda trial: float(lock.locked())), n_trials=1)
    study.optimize(isolated(lambda trial: float(lock.locked()), start_method="fork"), n_trials=1)
    assert study.trials[1].value == 0.0


def test_a_value_that_cannot_be_sent_is_a_crash() -> None:
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="type generator"):
        study.optimize(isolated(lambda trial: (x for x in ())), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
