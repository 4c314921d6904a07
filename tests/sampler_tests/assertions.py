"""What must hold of a study whatever happened to its trials."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from optuna_quota import status
from optuna_quota._metering import key_of, metering_loop
from optuna_quota._records import read_record


def assert_nothing_left(study: optuna.Study) -> None:
    """Assert that each trial is finished, recorded and not metered, and nothing is reserved."""
    assert study.trials
    for trial in study.trials:
        if trial.state == TrialState.WAITING:
            continue
        assert trial.state.is_finished(), trial
        assert metering_loop().find(key_of(study, trial)) is None
        record = read_record(trial)
        assert record.outcome is not None
        if trial.state != TrialState.COMPLETE:
            assert record.reason
    reserved = status(study).table["reserved"]
    assert (reserved == 0).all(), reserved
