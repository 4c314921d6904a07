"""An isolated trial whose row something else has finished is stopped, and the study goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import threading
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import _optuna, isolated, LimitBreached, Quota, QuotaSampler
from tests.waiting import until


def wait_for_the_end(trial: optuna.Trial) -> float:
    trial.suggest_float("x", 0, 1)
    folder = Path(trial.study.user_attrs["folder"])
    if trial.number == 0:
        (folder / "begun").touch()
        try:
            time.sleep(600)
        except LimitBreached as error:
            (folder / "stopped").write_text(str(error))
            raise
    return 1.0


def suggest(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def act_when_begun(folder: Path, act: Callable[[], Any]) -> threading.Thread:
    def run() -> None:
        until((folder / "begun").exists)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "quota"])
def test_a_trial_that_is_failed_from_outside(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    sampler = QuotaSampler(quota=Quota(n_trials=9)) if kind == "quota" else None
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    study.set_user_attr("folder", str(tmp_path))
    operator = optuna.load_study(study_name="s", storage=storage)
    optuna.logging.enable_propagation()
    thread = act_when_begun(tmp_path, lambda: operator.tell(0, state=TrialState.FAIL))
    study.optimize(isolated(wait_for_the_end, grace_period=60), n_trials=2)
    thread.join()
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "from outside" in (tmp_path / "stopped").read_text()
    assert "Trial 0 is stopped. Its row was marked as FAIL from outside." in caplog.text
    assert "could not record" not in caplog.text


@pytest.mark.slow
def test_a_trial_of_a_study_that_is_deleted(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr("folder", str(tmp_path))
    thread = act_when_begun(tmp_path, lambda: optuna.delete_study(study_name="s", storage=storage))
    with pytest.raises(KeyError):
        study.optimize(isolated(wait_for_the_end, grace_period=60), n_trials=2)
    thread.join()
    assert "deleted" in (tmp_path / "stopped").read_text()


@pytest.mark.parametrize("isolate", [True, False])
def test_a_trial_that_is_failed_from_outside_before_its_first_write(isolate: bool) -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
    storage = study._storage
    create = storage.create_new_trial

    def create_and_fail(*arguments: Any, **options: Any) -> int:
        trial_id = create(*arguments, **options)
        if len(study.get_trials(deepcopy=False)) == 1:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        return trial_id

    storage.create_new_trial = create_and_fail  # type: ignore[method-assign]
    objective: Any = isolated(suggest) if isolate else suggest
    study.optimize(objective, n_trials=3)
    assert [t.state for t in study.trials] == [TrialState.FAIL, *[TrialState.COMPLETE] * 2]


@pytest.mark.parametrize("by_number", [True, False])
def test_a_trial_in_process_that_was_failed_from_outside(by_number: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            trial.study.tell(trial.number if by_number else trial, state=TrialState.FAIL)
        return x

    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
    study.optimize(objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    with pytest.raises(ValueError, match="Cannot tell"):
        study.tell(0, 1.0)


def test_what_a_trial_that_was_failed_from_outside_raises_itself_is_not_lost() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.study.tell(trial.number, state=TrialState.FAIL)
        if trial.number == 0:
            trial.suggest_float("x", 0, 1)  # The row can't be changed any more.
        raise KeyError("learning_rate")

    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
    with pytest.raises(KeyError, match="learning_rate"):
        study.optimize(objective, n_trials=3)
    assert len(study.trials) == 2
    study.optimize(objective, n_trials=2, catch=(KeyError,))
    assert len(study.trials) == 4


def test_no_trace_of_a_trial_is_kept() -> None:
    before = set(_optuna.optimize._tolerant)
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
    for _ in range(2):
        study.tell(study.ask().number, 1.0)
    study.optimize(lambda trial: 1.0, n_trials=2)
    assert _optuna.optimize._tolerant == before
