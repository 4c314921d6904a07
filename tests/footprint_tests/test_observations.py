"""What a footprint model learns from one trial."""

from __future__ import annotations

from datetime import timedelta

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_quota._footprint.observations import read_observation


def plain_trial(seconds: float, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    trial = optuna.create_trial(
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        value=None if state == TrialState.FAIL else 1.0,
        state=state,
    )
    assert trial.datetime_start is not None
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=seconds)
    return trial


def test_a_trial_of_plain_optuna_tells_its_time() -> None:
    row = read_observation(plain_trial(12.5))
    assert row is not None
    assert row.usage.amounts() == {"wall_time": 12.5}
    assert not row.censored


def test_the_time_of_a_pruned_trial_of_plain_optuna_is_a_lower_bound() -> None:
    row = read_observation(plain_trial(3.0, TrialState.PRUNED))
    assert row is not None
    assert row.censored == {"wall_time"}


@pytest.mark.parametrize(
    "trial", [plain_trial(0.0), plain_trial(5.0, TrialState.FAIL)], ids=["by hand", "failed"]
)
def test_a_row_written_by_hand_and_a_failed_one_tell_nothing(trial: FrozenTrial) -> None:
    assert read_observation(trial) is None
