"""What a trial asks for before it runs, and while it does."""

from __future__ import annotations

from typing import get_args

import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota._ledger.grant import Asked
from optuna_quota._ledger.grant import first_wants
from optuna_quota._ledger.grant import more_wants
from optuna_quota._ledger.grant import revised_promise
from optuna_quota._ledger.protocol import Want


GIB = 2.0**30


@pytest.mark.parametrize("resource", ["memory", "gpu_memory", "cpu_cores"])
@pytest.mark.parametrize(
    ("limit", "bound", "n_jobs", "promised"),
    [
        (3.0, None, None, 3.0),
        (3.0, None, 4, 3.0),
        (3.0, 2.0, 4, 2.0),
        (3.0, 5.0, 4, 3.0),
        (None, 2.0, None, 2.0),
        (None, 3.0, 4, 3.0),
        (None, None, 4, 2.0),
        (None, None, None, 8.0),
        (9.0, None, None, 8.0),
    ],
)
def test_what_is_held_is_promised_as_a_whole_before_a_trial_starts(
    resource: str,
    limit: float | None,
    bound: float | None,
    n_jobs: int | None,
    promised: float,
) -> None:
    wants = first_wants(
        Quota(**{resource: 8}),  # type: ignore[arg-type]
        Limits(**{resource: limit}),  # type: ignore[arg-type]
        {},
        {resource: 1.0},
        3,
        bounds={} if bound is None else {resource: bound},
        n_jobs=n_jobs,
    )
    assert wants == {resource: Want(promised, promised)}


@pytest.mark.parametrize(
    ("asked", "limit", "want"),
    [
        ("by optimize", None, Want(8, 8)),
        ("by hand", None, Want(1, 4)),
        ("in a batch", None, Want(1, 4)),
        ("by optimize", 3, Want(3, 3)),
        ("by hand", 3, Want(3, 3)),
        ("in a batch", 3, Want(1, 3)),
        ("in a batch", 5, Want(1, 4)),
        ("in a batch", 0.5, Want(0.5, 0.5)),
    ],
)
def test_who_asks_by_hand_leaves_some_for_the_next(
    asked: Asked, limit: float | None, want: Want
) -> None:
    limits = Limits(memory=limit)
    wants = first_wants(Quota(memory=8), limits, {}, {"memory": 8.0}, 0, asked=asked)
    assert wants == {"memory": want}


def test_a_footprint_that_was_stated_is_asked_for_as_it_is() -> None:
    stated = {"memory": 9.0}
    for asked in get_args(Asked):
        wants = first_wants(Quota(memory=8), Limits(), stated, {}, 0, n_jobs=4, asked=asked)
        assert wants == {"memory": Want(9, 9)}


def test_a_trial_that_outgrew_its_promise_asks_for_no_less_than_it_holds() -> None:
    granted, needs = {"memory": 2 * GIB}, {"memory": 2.5 * GIB}
    quota = Quota(memory="8GiB")
    (want,) = more_wants(quota, Limits(), granted, needs, {"memory": 0.1 * GIB}, 3).values()
    assert want == Want(2.5 * GIB, 2.5 * GIB)
    (want,) = more_wants(quota, Limits(), granted, needs, {"memory": 6 * GIB}, 0).values()
    assert want == Want(2.5 * GIB, 5 * GIB)
    (want,) = more_wants(
        quota, Limits(memory="2.25GiB"), granted, needs, {"memory": 6 * GIB}, 0
    ).values()
    assert want == Want(2.25 * GIB, 2.25 * GIB)


@pytest.mark.parametrize(
    ("bound", "used", "smaller", "larger"),
    [
        (2.0, 0.0, {"memory": 2.0}, {}),
        (3.9, 0.0, {}, {}),
        (2.0, 3.5, {"memory": 3.5 / 0.9}, {}),
        (5.0, 0.0, {}, {"memory": 5.0}),
        (9.0, 0.0, {}, {"memory": 6.0}),
    ],
)
def test_a_promise_follows_the_point_once_it_is_known(
    bound: float, used: float, smaller: dict[str, float], larger: dict[str, float]
) -> None:
    granted = {"memory": 4.5 if smaller else 4.0}
    found = revised_promise(
        Quota(memory=8), Limits(memory=6), granted, {"memory": bound}, {"memory": used}
    )
    assert found == (smaller, larger)
