"""The exceptions' hierarchy, attributes and pickling."""

from __future__ import annotations

import copy
import pickle

import optuna
import pytest

from optuna_quota import (
    LimitBreached,
    QuotaError,
    QuotaExhausted,
    StudyRejected,
    TrialCrashed,
    TrialRejected,
)


ALL = [QuotaError, StudyRejected, QuotaExhausted, TrialCrashed, TrialRejected, LimitBreached]


@pytest.mark.parametrize("cls", ALL)
def test_hierarchy_and_pickling(cls: type[QuotaError]) -> None:
    error = cls("too much", resource="memory", limit=1.0, observed=2.0, quota=3.0)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert isinstance(again, QuotaError)
        assert str(again) == "too much"
        assert (again.resource, again.limit, again.observed, again.quota) == ("memory", 1, 2, 3)


def test_further_attributes() -> None:
    crashed = pickle.loads(pickle.dumps(TrialCrashed("died", exitcode=-11)))
    assert crashed.exitcode == -11
    assert StudyRejected("no").projection is None
    assert LimitBreached("over", seconds=2.5).seconds == 2.5


def test_which_are_trial_pruned() -> None:
    assert issubclass(TrialRejected, optuna.TrialPruned)
    assert issubclass(LimitBreached, optuna.TrialPruned)
    assert issubclass(TrialCrashed, RuntimeError)
    for cls in (StudyRejected, QuotaExhausted, TrialCrashed):
        assert not issubclass(cls, optuna.TrialPruned)
