"""check: for objectives that can't ask a pruner."""

from __future__ import annotations

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import check
from optuna_quota import LimitBreached
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._records import read_record


NONE = Limits(memory=1)
STUDIES = {
    "pruner": lambda **kw: optuna.create_study(pruner=QuotaPruner(limits=NONE), **kw),
    "sampler": lambda **kw: optuna.create_study(
        sampler=QuotaSampler(RandomSampler(), quota=Quota(n_trials=9), limits=NONE), **kw
    ),
    "both": lambda **kw: optuna.create_study(
        sampler=QuotaSampler(RandomSampler(), quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=NONE),
        **kw,
    ),
}


@pytest.mark.parametrize("which", STUDIES)
def test_a_multi_objective_trial_is_terminated(which: str) -> None:
    study = STUDIES[which](directions=["minimize", "maximize"])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        check(trial)
        raise AssertionError("not terminated")

    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        assert trial.state == TrialState.PRUNED
        if which != "pruner":
            assert read_record(trial).outcome == "terminated"


@pytest.mark.parametrize("which", STUDIES)
def test_ask_and_tell(which: str) -> None:
    study = STUDIES[which]()
    trial = study.ask()
    with pytest.raises(LimitBreached) as caught:
        check(trial)
    assert caught.value.resource == "memory"
    assert caught.value.limit == 1
    assert caught.value.observed is not None and caught.value.observed > 1
    assert caught.value.seconds is not None
    study.tell(trial, state=TrialState.PRUNED)
    if which != "pruner":
        record = read_record(study.trials[0])
        assert record.outcome == "terminated"
        assert record.reason is not None and record.reason.startswith(str(caught.value)[:30])


def test_nothing_is_checked_where_there_is_nothing_to_check() -> None:
    check(optuna.trial.FixedTrial({"x": 1}))
    check(optuna.create_study().ask())
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(memory="1TiB")),
    )
    check(study.ask())
