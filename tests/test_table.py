"""The trial table: columns, types, and studies with unusual content."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import Quota, trial_table, Usage
from optuna_quota._analysis.replay import traces_of
from optuna_quota._analysis.study_trials import StudyTrials
from optuna_quota._footprint.observations import read_observation
from optuna_quota._ledger.totals import read_entry
from optuna_quota._records import Interval, read_finished, record_attributes, TrialRecord
from optuna_quota._resources import Outcome
from optuna_quota._usage import Breach
from optuna_quota._utilization.data import study_data


SPACE = {"width": IntDistribution(1, 4096, log=True), "dropout": FloatDistribution(0.0, 1.0)}


def study_of(*records: TrialRecord, **kwargs: Any) -> optuna.Study:
    study = optuna.create_study()
    for record in records:
        study.add_trial(trial_of(record, **kwargs))
    return study


def trial_of(record: TrialRecord, **kwargs: Any) -> optuna.trial.FrozenTrial:
    arguments = {
        "state": TrialState.COMPLETE,
        "value": 1.0,
        "params": {"width": 64, "dropout": 0.5},
        "distributions": SPACE,
        "user_attrs": record_attributes(record),
        **kwargs,
    }
    return create_trial(**arguments)


FIXED = ["number", "state", "value"]
USAGE = ["memory", "wall_time", "cpu_time", "gpu_memory", "gpu_time", "energy"]
TEXTS = ["outcome", "reason", "isolation", "host", "censored_by"]


def test_an_empty_study_has_the_columns_and_no_row() -> None:
    table = trial_table(optuna.create_study())

    assert len(table) == 0
    footprints = {f"footprint_memory{suffix}" for suffix in ("", "_lower", "_upper")}
    assert {*FIXED, *USAGE, *TEXTS, *footprints} <= set(table.columns)
    assert table["memory"].dtype == float
    assert table["reason"].dtype == object


def test_a_row_has_the_values_of_its_record() -> None:
    breach = Breach("memory", 2.0**31, 2.5 * 2**30, 3.25)
    study = study_of(
        TrialRecord(
            usage=Usage(memory=2.5 * 2**30, wall_time=3.5, cpu_time=6.0, custom={"disk": 7.0}),
            outcome="terminated",
            reason=breach.reason,
            breach=breach,
            footprint={"memory": Interval(1.0, 2.0, 4.0)},
            isolation="process",
            host="node-1",
        ),
        state=TrialState.PRUNED,
        value=None,
    )

    (row,) = trial_table(study).to_dict("records")

    assert (row["number"], row["state"], row["outcome"]) == (0, "PRUNED", "terminated")
    assert (row["memory"], row["wall_time"], row["cpu_time"]) == (2.5 * 2**30, 3.5, 6.0)
    assert math.isnan(row["gpu_memory"]) and math.isnan(row["value"])
    assert row["disk"] == 7.0
    assert (row["isolation"], row["host"], row["censored_by"]) == ("process", "node-1", "memory")
    assert row["reason"] == breach.reason
    assert (row["breach_limit"], row["breach_seconds"]) == (2.0**31, 3.25)
    assert [row[f"footprint_memory{s}"] for s in ("_lower", "", "_upper")] == [1.0, 2.0, 4.0]
    assert (row["params_width"], row["params_dropout"]) == (64, 0.5)


def test_only_a_terminated_trial_is_censored_by_its_breach() -> None:
    breach = Breach("wall_time", 5.0, 6.0, 6.0)
    table = trial_table(
        study_of(
            TrialRecord(outcome="terminated", breach=breach),
            TrialRecord(outcome="completed", breach=breach),
            TrialRecord(outcome="pruned"),
        )
    )

    assert table["censored_by"].tolist() == ["wall_time", None, None]


def test_a_study_of_plain_optuna_has_its_wall_time() -> None:
    start = datetime.datetime(2026, 1, 1, 12)
    study = optuna.create_study()
    for seconds in (90.0, -5.0):
        trial = trial_of(TrialRecord())
        trial.datetime_start = start
        trial.datetime_complete = start + datetime.timedelta(seconds=seconds)
        study.add_trial(trial)

    table = trial_table(study)

    assert table["wall_time"][0] == 90.0
    assert math.isnan(table["wall_time"][1]), "a clock set back measures nothing"
    assert table["outcome"].tolist() == [None, None]
    assert table["memory"].isna().all()


@pytest.mark.parametrize(("seconds", "expected"), [(90.0, 90.0), (0.0, None), (-5.0, None)])
def test_all_agree_on_the_wall_time_of_a_trial_of_plain_optuna(
    seconds: float, expected: float | None
) -> None:
    study = study_of(TrialRecord())
    trial = study.trials[0]
    assert trial.datetime_start is not None
    trial.datetime_complete = trial.datetime_start + datetime.timedelta(seconds=seconds)
    study = optuna.create_study()
    study.add_trial(trial)
    (trial,) = study.trials

    (in_table,) = trial_table(study)["wall_time"].replace({math.nan: None})
    observation = read_observation(trial)
    found = {
        "table": in_table,
        "replay": traces_of(*read_finished(study))[0].amounts.get("wall_time"),
        "plots": StudyTrials(study).finished[0].amounts.get("wall_time"),
        "footprint": observation and observation.usage.wall_time,
        "ledger": read_entry(trial, 0, Quota(trial_time=1)).charges.get("trial_time"),
    }

    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize(("outcome", "expected"), [("terminated", 1e9), ("completed", 5e8)])
def test_all_agree_on_the_memory_of_a_trial_that_was_to_breach_its_limit(
    outcome: Outcome, expected: float
) -> None:
    """One that was stopped below its limit would have used more; one that completed did not."""
    breach = Breach("memory", 1e9, 2e9, 3.0, forecast=True)
    record = TrialRecord(Usage(memory=5e8, wall_time=3.0), outcome, breach=breach)
    state = TrialState.COMPLETE if outcome == "completed" else TrialState.PRUNED
    study = optuna.create_study()
    study.add_trial(trial_of(record, state=state))

    observation = read_observation(study.trials[0])
    found = {
        "models": study_data(study).amounts("memory")[0],
        "replay": traces_of(*read_finished(study))[0].amounts["memory"],
        "footprint": observation and observation.usage.memory,
    }

    assert found == dict.fromkeys(found, expected)


def test_a_rejected_trial_took_no_time() -> None:
    trial = trial_of(TrialRecord(outcome="rejected"), state=TrialState.FAIL, value=None)
    study = optuna.create_study()
    study.add_trial(trial)

    assert trial_table(study)["wall_time"].isna().all()


def test_running_and_waiting_trials_have_rows() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 1.0})
    study.ask()
    study.enqueue_trial({"x": 2.0})

    table = trial_table(study)

    assert table["state"].tolist() == ["RUNNING", "WAITING"]
    assert table["wall_time"].isna().all()


def test_objectives_have_a_column_each() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.add_trial(create_trial(values=[1.0, 2.0]))
    study.add_trial(create_trial(state=TrialState.FAIL))

    table = trial_table(study)

    assert table["values_0"].tolist()[:1] == [1.0]
    assert table["values_1"].tolist()[:1] == [2.0]
    assert table[["values_0", "values_1"]].iloc[1].isna().all()
    assert "value" not in table


def test_conditional_and_categorical_parameters_keep_their_values() -> None:
    study = optuna.create_study()
    kinds = CategoricalDistribution([None, "a", True, 3])
    for choice in (None, "a", True, 3):
        study.add_trial(
            create_trial(value=0.0, params={"kind": choice}, distributions={"kind": kinds})
        )
    depth = {"depth": IntDistribution(1, 9)}
    study.add_trial(create_trial(value=0.0, params={"depth": 3}, distributions=depth))

    table = trial_table(study)

    assert table["params_kind"].tolist() == [None, "a", True, 3, None]
    assert np.isnan(table["params_depth"][:4]).all() and table["params_depth"][4] == 3


@pytest.mark.parametrize(
    "attributes",
    [
        {"quota:memory": "a lot", "quota:outcome": 7, "quota:breach": [1, 2]},
        {"quota:memory": float("nan"), "quota:wall_time": float("inf"), "quota:host": None},
        {"quota:footprint": {"memory": {"median": 1.0}}, "quota:timeline": "x", "memory": 3},
        {"quota:state": 3.0, "quota:number": 9, "quota:value": 8.0, "quota:reason": {}},
    ],
)
def test_malformed_and_clashing_attributes_are_left_out(attributes: dict[str, Any]) -> None:
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0, user_attrs=attributes))

    (row,) = trial_table(study).to_dict("records")

    assert math.isnan(row["memory"])
    assert (row["number"], row["state"], row["value"]) == (0, "COMPLETE", 1.0)
    assert row["outcome"] is None and row["reason"] is None and row["host"] is None


def test_terabytes_and_large_integers_pass() -> None:
    study = optuna.create_study()
    big = IntDistribution(1, 2**70)
    study.add_trial(
        create_trial(
            value=1.0,
            params={"seed": 2**69},
            distributions={"seed": big},
            user_attrs=record_attributes(TrialRecord(usage=Usage(memory="2TB"))),
        )
    )

    table = trial_table(study)

    assert table["memory"][0] == 2e12
    assert table["params_seed"][0] == 2**69
