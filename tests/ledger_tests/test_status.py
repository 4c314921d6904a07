"""What the ledger shows to people."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from optuna_quota import Quota, status, Strategy, Usage
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.status import LedgerLine, LedgerStatus, stored_quota
from optuna_quota._projection.projection import ProjectedResource, Projection
from optuna_quota._records import amounts_object, STUDY_PRICES, STUDY_QUOTA
from tests.ledger_tests.test_ledger import begin, finish, reserve


def study_with(quota: Quota) -> optuna.Study:
    study = optuna.create_study()
    study.set_user_attr(STUDY_QUOTA, amounts_object(quota))
    if quota.prices:
        study.set_user_attr(STUDY_PRICES, dict(quota.prices))
    return study


def test_used_reserved_and_left_come_from_rows_and_the_studys_quota() -> None:
    quota = Quota(cpu_time=100, n_trials=10, memory="8GiB")
    study = study_with(quota)
    ledger = Ledger(study, quota)
    first, second = begin(study), begin(study)
    reserve(ledger, first, {"cpu_time": 30, "memory": 2**30})
    finish(study, ledger, first, Usage(cpu_time=25, wall_time=50))
    reserve(ledger, second, {"cpu_time": 40, "memory": 2**31})
    table = status(study).table
    assert list(table.columns) == ["used", "reserved", "left", "quota"]
    assert table.loc["cpu_time"].to_dict() == {
        "used": 25,
        "reserved": 40,
        "left": 35,
        "quota": 100,
    }
    assert table.loc["n_trials"].to_dict() == {"used": 1, "reserved": 1, "left": 8, "quota": 10}
    assert table.loc["memory", "reserved"] == 2**31
    assert table.loc["memory", "left"] == 6 * 2**30
    assert table.loc["trial_time", "used"] == 50 and math.isnan(table.loc["trial_time", "quota"])


def test_usage_is_shown_by_worker_and_by_outcome() -> None:
    quota = Quota(cpu_time=100)
    study = study_with(quota)
    ledger = Ledger(study, quota)
    for rejected in (False, True, False):
        trial = begin(study)
        reserve(ledger, trial, {"cpu_time": 10})
        finish(study, ledger, trial, Usage(cpu_time=10), rejected=rejected)
    running = begin(study)
    reserve(ledger, running, {"cpu_time": 10})
    found = status(study)
    (worker,) = found.workers.index
    assert found.workers.loc[worker, "running"] == 1
    assert found.workers.loc[worker, "cpu_time"] == 20
    assert found.outcomes.loc["completed", "n_trials"] == 2
    text = str(found)
    assert worker in text and "completed" in text and "CPU time" in text and "20%" not in text
    assert "30%" in text


def test_a_study_without_a_quota_or_trials_has_a_status() -> None:
    found = status(optuna.create_study())
    assert found.table.loc["n_trials", "used"] == 0
    assert str(found)


def test_a_quota_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="`quota` must be a Quota but got 5"):
        status(optuna.create_study(), quota=5)  # type: ignore[arg-type]


def test_the_pace_so_far_shows_which_quota_ends_first() -> None:
    lines = (
        LedgerLine("wall_time", 100, 0, 1000),
        LedgerLine("cpu_time", 50, 0, 100),
    )
    from optuna_quota._ledger.status import _end_at_this_pace

    text = _end_at_this_pace(lines)
    assert text is not None and "CPU time" in text and "1 min 40 s" in text
    assert _end_at_this_pace((LedgerLine("wall_time", 0, 0, 10),)) is None


def test_a_projection_tells_the_end() -> None:
    row = ProjectedResource("wall_time", 100.0, 130.0, 160.0, 220.0, None, None)
    projection = Projection(Strategy(2), (row,), 1.0)
    text = status(optuna.create_study(), projection=projection).end
    assert text is not None and "1 min 0 s" in text.replace("1 min of", "1 min 0 s of")
    assert "2 min" in text


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {STUDY_QUOTA: "8GiB"},
        {STUDY_QUOTA: {"cpu_time": "much", "memory": -1, "invented": 5}},
        {STUDY_QUOTA: {"cost": 5}},
        {STUDY_QUOTA: {"n_trials": 1.5}},
    ],
)
def test_a_malformed_quota_is_none(attributes: dict[str, object]) -> None:
    assert not stored_quota(attributes)


def test_unknown_usage_is_reported_and_counts_with_the_limit() -> None:
    quota = Quota(cpu_time=100)
    study = study_with(quota)
    study.set_user_attr("quota:limits", {"cpu_time": 20})
    # Its worker had another quota, so that nothing was granted.
    ledger, trial = Ledger(study, Quota(n_trials=9)), begin(study)
    reserve(ledger, trial)
    finish(study, ledger, trial, Usage())
    found = status(study)
    assert found.table.loc["cpu_time", "used"] == 20
    assert "unknown" in str(found)


def test_waiting_trials_are_counted() -> None:
    assert "wait" in str(LedgerStatus((LedgerLine("n_trials", 0, 0, None),), waiting=2))


def test_a_notebook_shows_what_the_text_says() -> None:
    line = LedgerLine("n_trials", 3, 0, 5)
    groups = {"completed": {"n_trials": 3.0}, "rejected": {}}
    found = LedgerStatus((line,), {"<host>:1": {"n_trials": 3.0}}, groups, end="Soon.")
    for text in (str(found), found._repr_html_()):
        assert "trials" in text and "60%" in text and "completed" in text and "Soon." in text
        assert "rejected" not in text
    assert "<td" in found._repr_html_() and "<host>" not in found._repr_html_()


def test_it_leaves_the_storage_as_it_is(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    storage = study._storage
    before = type(storage)
    status(study)
    # A dashboard's other calls are not to wait for a server that is away.
    assert type(storage) is before
