"""`analyze` checks its arguments and returns a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import analyze, Quota, replay, status, trial_table, Usage
from tests.analysis_tests.studies import finished, power_law_study, SPACE, study_of


def test_str_is_the_summary() -> None:
    report = analyze(power_law_study(10))

    assert str(report) == report.summary()
    assert "10 trials" in repr(report)


def test_user_attributes_are_analyzed_like_hyperparameters() -> None:
    trials = [
        finished(
            {"x": 1.0},
            Usage(),
            {"x": FloatDistribution(0.0, 100.0)},
            user_attrs={"rows": 10 * i, "quota:memory": 1e6 * i},
        )
        for i in range(1, 13)
    ]
    study = study_of(*trials)

    assert "rows" not in set(analyze(study).correlations["param"])
    table = analyze(study, user_attrs=["rows"]).correlations.set_index(["param", "resource"])
    assert table.loc[("rows", "memory"), "rho"] > 0.99


@pytest.mark.parametrize("wrong", ["rows", [1], [None]])
def test_user_attributes_must_be_names(wrong: object) -> None:
    with pytest.raises(TypeError, match="user_attrs"):
        analyze(power_law_study(2), user_attrs=wrong)  # type: ignore[arg-type]


def test_a_user_attribute_named_like_a_hyperparameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="but has 'rows'"):
        analyze(power_law_study(3), user_attrs=["rows"])


def test_unknown_user_attributes_are_ignored() -> None:
    report = analyze(power_law_study(30), user_attrs=["nothing"])

    assert "nothing" not in report.models["memory"].coefficients.index
    assert set(SPACE) <= set(report.correlations["param"])


def test_the_study_must_be_a_study() -> None:
    calls: list[Callable[[Any], Any]] = [
        analyze,
        status,
        trial_table,
        lambda study: replay(study, quota=Quota(n_trials=1)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="`study` must be an Optuna study but got 'study'"):
            call("study")
