"""The error tree: catchable at three levels, carrying figures, surviving pickling."""

from __future__ import annotations

import copy
import pickle

import optuna
import pytest

from optuna_quota import LimitBreached
from optuna_quota import QuotaError
from optuna_quota import QuotaExhausted
from optuna_quota import StudyRejected
from optuna_quota import TrialCrashed
from optuna_quota import TrialRejected


ALL = [QuotaError, StudyRejected, QuotaExhausted, TrialCrashed, TrialRejected, LimitBreached]


@pytest.mark.parametrize("cls", ALL)
def test_each_is_one_of_the_family_and_survives_pickling(cls: type[QuotaError]) -> None:
    error = cls("too much", resource="memory", limit=1.0, observed=2.0, quota=3.0)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert isinstance(again, QuotaError)
        assert str(again) == "too much"
        assert (again.resource, again.limit, again.observed, again.quota) == ("memory", 1, 2, 3)


def test_figures_of_their_own() -> None:
    crashed = pickle.loads(pickle.dumps(TrialCrashed("died", exitcode=-11)))
    assert crashed.exitcode == -11
    assert StudyRejected("no").projection is None
    assert LimitBreached("over", seconds=2.5).seconds == 2.5


def test_optuna_knows_those_that_prune() -> None:
    assert issubclass(TrialRejected, optuna.TrialPruned)
    assert issubclass(LimitBreached, optuna.TrialPruned)
    assert issubclass(TrialCrashed, RuntimeError)
    for cls in (StudyRejected, QuotaExhausted, TrialCrashed):
        assert not issubclass(cls, optuna.TrialPruned)
