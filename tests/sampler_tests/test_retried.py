"""Trials tried again, and enqueued ones that are refused: their rows tell of themselves."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import create_trial
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaSampler
from optuna_quota import status
from optuna_quota import TrialRejected
from optuna_quota import Usage
from optuna_quota._records import PREFIX
from optuna_quota._records import read_record
from optuna_quota._records import TIMELINE


SPACE = {"x": FloatDistribution(0, 1)}
COPIED = {
    "quota:outcome": "failed",
    "quota:reason": "Its worker died.",
    "quota:memory": 7,
    "quota:breach": {"resource": "memory", "limit": 1, "observed": 7, "seconds": 1.0},
    "quota:my_meter": 3,
    "other": "kept",
}


def study_with(**attributes: Any) -> optuna.Study:
    sampler = QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=9), **attributes)
    return optuna.create_study(sampler=sampler)


def test_what_a_retried_trial_copied_is_not_told_of_it() -> None:
    study = study_with()
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            user_attrs=COPIED,
            system_attrs={"fixed_params": {"x": 0.5}, TIMELINE: [[0, 7]]},
        )
    )
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    assert {k: v for k, v in trial.user_attrs.items() if v is not None} == {"other": "kept"}
    study.tell(trial, 1.0)
    (row,) = study.trials
    record = read_record(row)
    assert (record.outcome, record.reason, record.breach) == ("completed", None, None)
    assert not record.usage.custom and record.usage.memory != 7
    assert not record.timeline


def test_a_trial_that_has_begun_keeps_what_its_row_says() -> None:
    study = study_with()
    trial = study.ask()
    trial.set_user_attr(f"{PREFIX}proposed", {"action": "moved"})
    again = optuna.trial.Trial(study, trial._trial_id)
    assert again.user_attrs[f"{PREFIX}proposed"] == {"action": "moved"}
    study.tell(trial, 1.0)


def test_an_enqueued_point_refused_inside_ask_leaves_no_row_running() -> None:
    study = study_with(
        limits=Limits(memory="1GiB"), footprint=lambda params: Usage(memory=4e9 * params["x"])
    )
    study.enqueue_trial({"x": 0.9})
    with pytest.raises(TrialRejected, match="Memory"):
        study.ask(SPACE)
    (row,) = study.trials
    assert row.state == TrialState.PRUNED
    assert read_record(row).outcome == "rejected"
    assert (status(study).table["reserved"] == 0).all()
    # Later on it is the caller who has the trial, and ends it.
    study.enqueue_trial({"x": 0.8})
    trial = study.ask()
    with pytest.raises(TrialRejected, match="Memory"):
        trial.suggest_float("x", 0, 1)
    assert study.trials[1].state == TrialState.RUNNING
    study.tell(trial, state=TrialState.PRUNED)
    assert read_record(study.trials[1]).outcome == "rejected"
