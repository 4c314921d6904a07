"""The protocol of users' own meters, from its checks to the trial table."""

from __future__ import annotations

import optuna
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._metering import check_names
from optuna_quota.testing import check_meter, fake_metering, FakeMeter


def test_a_users_meter_end_to_end() -> None:
    meter = FakeMeter("licences", 1.0)

    def objective(trial: optuna.Trial) -> float:
        meter.value = 1.0 + trial.number
        trial.report(0.0, 0)
        metering.advance(0.2)
        if trial.should_prune():
            raise optuna.TrialPruned
        return 0.0

    with fake_metering() as metering:
        study = optuna.create_study(
            sampler=QuotaSampler(quota=Quota(n_trials=100)),
            pruner=QuotaPruner(
                optuna.pruners.NopPruner(), limits=Limits(custom={"licences": 2}), meters=[meter]
            ),
        )
        study.optimize(objective, n_trials=3)
    outcomes = [trial.user_attrs["quota:outcome"] for trial in study.trials]
    assert outcomes == ["completed", "completed", "terminated"]
    assert [trial.user_attrs["quota:licences"] for trial in study.trials] == [1.0, 2.0, 3.0]
    assert study.trials[2].user_attrs["quota:breach"]["resource"] == "licences"


class Unnamed:
    peak = True

    def read(self, pids: object) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("meters", "error"),
    [
        ([Unnamed()], TypeError),
        ([FakeMeter("memory")], ValueError),
        ([FakeMeter("outcome")], ValueError),
        ([FakeMeter("value")], ValueError),
        ([FakeMeter("params_x")], ValueError),
        ([FakeMeter("two words")], ValueError),
        ([FakeMeter("a"), FakeMeter("a")], ValueError),
    ],
)
def test_invalid_meters(meters: list[FakeMeter], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"must|name"):
        check_names(meters)


@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "text"])
def test_check_meter_finds_faults(value: float) -> None:
    with pytest.raises(AssertionError):
        check_meter(FakeMeter("mine", value))
    check_meter(FakeMeter("mine", 3.0))
    check_meter(FakeMeter("mine", None))
