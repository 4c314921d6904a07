"""Attributes are written and read back; malformed ones are unknown and never executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings, strategies as st
import numpy as np
import optuna
import pytest

from optuna_quota import _records, Limits, Quota, Usage
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import Interval, TrialRecord
from optuna_quota._usage import Breach


FULL = TrialRecord(
    usage=Usage(memory=2**30, wall_time=1.5, cpu_time=1.25, custom={"disk": 7.0}),
    outcome="terminated",
    reason="Memory reached 1 GiB.",
    breach=Breach("memory", 2**29, 2**30, 1.5, forecast=True),
    footprint={"memory": Interval(1.0, 2.0, 3.5)},
    isolation="process",
    host="box",
    timeline=((0.0, 1.0), (1.5, 2**30)),
    breach_timeline=((0.0, 0.25), (1.5, 3.0)),
)


@pytest.fixture(params=["memory", "sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return optuna.storages.InMemoryStorage()
    if request.param == "sqlite":
        return optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'a.db'}")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    return optuna.storages.JournalStorage(backend)


def test_a_reason_fits_into_every_database() -> None:
    found = _records.record_attributes(TrialRecord(reason="\U0001f600" * 100_000))
    assert len(json.dumps(found[_records.REASON])) < 65_535
    assert _records.record_attributes(TrialRecord(reason="short"))[_records.REASON] == "short"


def test_a_record_is_read_back_as_written(storage: Any) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    _records.write_record(storage_of(study), trial_id_of(trial), FULL)
    study.tell(trial, 1.0)
    assert _records.read_record(study.trials[0]) == FULL
    assert study.trials[0].user_attrs["quota:memory"] == 2**30
    assert study.trials[0].user_attrs["quota:breach"] == {
        "resource": "memory",
        "limit": 2**29,
        "observed": 2**30,
        "seconds": 1.5,
        "forecast": True,
    }


def test_numbers_of_numpy_are_cast_for_the_storage(storage: Any) -> None:
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    record = TrialRecord(usage=Usage(memory=np.int64(5), wall_time=np.float32(0.5)))
    _records.write_record(storage_of(study), trial_id_of(trial), record)
    assert study.trials[0].user_attrs == {"quota:memory": 5, "quota:wall_time": 0.5}


def test_an_empty_record_has_no_attributes() -> None:
    assert _records.record_attributes(TrialRecord()) == {}
    assert _records.parse_record({}) == TrialRecord()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "x",
        -1,
        float("nan"),
        float("inf"),
        [],
        {},
        [[]],
        {"resource": 3},
        10**400,
        "__import__('os')",
    ],
)
@pytest.mark.parametrize(
    "key",
    [
        "memory",
        "wall_time",
        "outcome",
        "reason",
        "breach",
        "footprint",
        "isolation",
        "host",
        "timeline",
    ],
)
def test_a_malformed_attribute_is_unknown(key: str, value: Any) -> None:
    record = _records.parse_record({_records.PREFIX + key: value})
    if isinstance(value, str) and key in ("reason", "host"):
        assert getattr(record, key) == value
    else:
        assert record == TrialRecord()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = [
    *("memory", "wall_time", "energy", "outcome", "reason", "breach", "footprint", "timeline"),
    *("isolation", "host", "disk", "", "__class__", "a b"),
]


@pytest.mark.slow
@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["quota:" + k for k in KEYS]), json_values))
def test_any_attributes_are_read_without_an_error(attributes: dict[str, Any]) -> None:
    record = _records.parse_record(attributes)
    assert _records.parse_record(_records.record_attributes(record)).usage == record.usage


@given(json_values)
def test_any_amounts_of_a_study_are_read_without_an_error(value: Any) -> None:
    assert all(amount > 0 for amount in _records.read_amounts(value).values())


def test_quota_and_limits_are_stored_as_plain_numbers() -> None:
    quota = Quota(wall_time="2h", memory="12GiB", n_trials=10)
    assert _records.amounts_object(quota) == {
        "n_trials": 10,
        "wall_time": 7200,
        "memory": 12 * 2**30,
    }
    limits = Limits(memory="1GiB", custom={"disk": 5})
    assert _records.amounts_object(limits) == {"memory": 2**30, "disk": 5}
    assert Limits.from_amounts(_records.read_amounts(_records.amounts_object(limits))) == limits


@pytest.mark.parametrize(
    ("resource", "outcome", "censored_by", "expected"),
    [
        ("memory", "completed", None, "value"),
        ("wall_time", "completed", None, "value"),
        ("memory", "rejected", None, "value"),
        ("memory", None, None, "value"),
        ("memory", "pruned", None, "partial peak"),
        ("wall_time", "pruned", None, "partial"),
        ("cpu_time", "pruned", None, "partial"),
        ("memory", "terminated", "memory", "lower bound"),
        ("wall_time", "terminated", "memory", "partial"),
        ("gpu_memory", "terminated", "memory", "partial"),
        ("wall_time", "terminated", "wall_time", "lower bound"),
        ("energy", "terminated", "wall_time", "lower bound"),
        ("memory", "terminated", "wall_time", "partial peak"),
        ("memory", "terminated", None, "partial"),
        ("memory", "failed", None, "partial"),
    ],
)
def test_evidence_of_usage(
    resource: str, outcome: str | None, censored_by: str | None, expected: str
) -> None:
    assert _records.evidence(resource, outcome, censored_by) == expected
