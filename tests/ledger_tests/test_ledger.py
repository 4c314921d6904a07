"""The ledger with one process: admission, slices, settling, exhaustion."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState
import pytest

from optuna_quota import Limits, Quota, Usage
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.heartbeat import RunningTrial
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import TrialRecord, write_record


def begin(study: optuna.Study) -> FrozenTrial:
    trial = study.ask()
    return storage_of(study).get_trial(trial_id_of(trial))


def reserve(
    ledger: Ledger,
    trial: FrozenTrial,
    footprint: Mapping[str, float] | None = None,
    limits: Limits | None = None,
) -> RunningTrial | Refusal:
    return ledger.reserve(trial, limits=limits or Limits(), footprint=footprint or {})


def extend(ledger: Ledger, trial: FrozenTrial, **needs: float) -> Mapping[str, float]:
    """Request more for a running trial, as its metering does; return what it may use."""
    running = ledger._running[trial_id_of(trial)]
    ledger._extend(running, needs)
    return running.left


def finish(
    study: optuna.Study,
    ledger: Ledger,
    trial: FrozenTrial,
    usage: Usage,
    *,
    rejected: bool = False,
) -> None:
    trial_id = trial_id_of(trial)
    record = TrialRecord(usage=usage, outcome="rejected" if rejected else "completed")
    write_record(storage_of(study), trial_id, record)
    ledger.charge(trial_id, usage)
    state = TrialState.FAIL if rejected else TrialState.COMPLETE
    storage_of(study).set_trial_state_values(trial_id, state, None if rejected else [0.0])


def test_a_count_of_trials_is_never_exceeded() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=3))
    trials = [begin(study) for _ in range(4)]
    answers = [reserve(ledger, trial) for trial in trials]
    assert [type(answer) for answer in answers] == [
        RunningTrial,
        RunningTrial,
        RunningTrial,
        Refusal,
    ]
    refusal = answers[3]
    assert isinstance(refusal, Refusal) and refusal.final and refusal.resource == "n_trials"
    assert (refusal.reserved, refusal.quota) == (3, 3)


def test_a_rejected_trial_counts_for_nothing() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(n_trials=1))
    rejected = begin(study)
    assert isinstance(reserve(ledger, rejected), RunningTrial)
    finish(study, ledger, rejected, Usage(), rejected=True)
    assert isinstance(reserve(ledger, begin(study)), RunningTrial)


def test_a_footprint_is_reserved_in_full_and_settled_with_what_was_used() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(cpu_time=100))
    first = begin(study)
    answer = reserve(ledger, first, {"cpu_time": 60})
    assert isinstance(answer, RunningTrial) and answer.left["cpu_time"] == 60
    finish(study, ledger, first, Usage(cpu_time=30))
    second = begin(study)
    assert isinstance(reserve(ledger, second, {"cpu_time": 60}), RunningTrial)
    finish(study, ledger, second, Usage(cpu_time=60))
    refusal = reserve(ledger, begin(study), {"cpu_time": 60})
    assert isinstance(refusal, Refusal) and refusal.final
    assert (refusal.used, refusal.wanted, refusal.quota) == (90, 60, 100)


def test_slices_extend_until_the_quota_is_reserved() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(cpu_time=100))
    trial = begin(study)
    answer = reserve(ledger, trial)
    assert isinstance(answer, RunningTrial)
    left = answer.left["cpu_time"]
    assert 0 < left < 100
    for _ in range(40):
        more = extend(ledger, trial, cpu_time=left)["cpu_time"]
        assert more >= left
        left = more
    assert left == pytest.approx(100, rel=2e-3)


def test_a_slice_is_not_more_than_the_limit() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(cpu_time=100, trial_time=1000))
    trial = begin(study)
    answer = reserve(ledger, trial, limits=Limits(cpu_time=10, wall_time=20))
    assert isinstance(answer, RunningTrial)
    assert answer.left == {"cpu_time": 10, "trial_time": 20}
    assert extend(ledger, trial, cpu_time=9.5)["cpu_time"] == 10


def test_a_quota_used_up_admits_nothing_more() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(cpu_time=100))
    assert ledger.exhausted() is None
    trial = begin(study)
    reserve(ledger, trial)
    finish(study, ledger, trial, Usage(cpu_time=100.5))
    refusal = ledger.exhausted()
    assert refusal is not None and refusal.final and refusal.used == 100.5
    assert isinstance(reserve(ledger, begin(study)), Refusal)


def test_unknown_usage_counts_as_what_was_reserved() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(energy="1kWh"))
    trial = begin(study)
    answer = reserve(ledger, trial, {"energy": 3.0e6})
    assert isinstance(answer, RunningTrial)
    finish(study, ledger, trial, Usage())
    refusal = reserve(ledger, begin(study), {"energy": 3.0e6})
    assert isinstance(refusal, Refusal) and refusal.used == 3.0e6


def test_cost_is_priced_by_what_was_used() -> None:
    study = optuna.create_study()
    ledger = Ledger(study, Quota(cost=10, prices={"cpu_time": 3600}))
    trial = begin(study)
    answer = reserve(ledger, trial, {"cpu_time": 4})
    assert isinstance(answer, RunningTrial) and answer.left["cost"] == 4
    finish(study, ledger, trial, Usage(cpu_time=7))
    refusal = reserve(ledger, begin(study), {"cpu_time": 4})
    assert isinstance(refusal, Refusal) and refusal.resource == "cost" and refusal.used == 7


def test_another_ledger_of_the_same_study_continues() -> None:
    study = optuna.create_study()
    first = Ledger(study, Quota(n_trials=2))
    trial = begin(study)
    reserve(first, trial)
    finish(study, first, trial, Usage(cpu_time=1))
    second = Ledger(study, Quota(n_trials=2))
    assert isinstance(reserve(second, begin(study)), RunningTrial)
    assert isinstance(reserve(second, begin(study)), Refusal)
