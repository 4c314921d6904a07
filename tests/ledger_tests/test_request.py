"""What a trial asks for before it runs, and while it does."""

from __future__ import annotations

import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota._ledger.protocol import Want
from optuna_quota._ledger.request import first_wants
from optuna_quota._ledger.request import more_wants
from optuna_quota._ledger.request import revised_promise


GIB = 2.0**30


@pytest.mark.parametrize("resource", ["memory", "gpu_memory", "cpu_cores"])
@pytest.mark.parametrize(
    ("limit", "footprint", "n_jobs", "promised"),
    [
        (3.0, None, None, 3.0),
        (3.0, None, 4, 3.0),
        (3.0, 2.0, 4, 2.0),
        (3.0, 5.0, 4, 3.0),
        (None, 2.0, None, 2.0),
        (None, None, 4, 2.0),
        (None, None, None, 8.0),
        (9.0, None, None, 8.0),
    ],
)
def test_what_is_held_is_promised_as_a_whole_before_a_trial_starts(
    resource: str,
    limit: float | None,
    footprint: float | None,
    n_jobs: int | None,
    promised: float,
) -> None:
    wants = first_wants(
        Quota(**{resource: 8}),  # type: ignore[arg-type]
        Limits(**{resource: limit}),  # type: ignore[arg-type]
        {} if footprint is None else {resource: footprint},
        {resource: 1.0},
        3,
        n_jobs=n_jobs,
    )
    assert wants == {resource: Want(promised, promised)}


def test_who_asks_by_hand_gets_a_part_of_what_is_free() -> None:
    wants = first_wants(Quota(memory=8), Limits(), {}, {"memory": 8.0}, 0, whole=False)
    assert wants == {"memory": Want(1.0, 4.0)}


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
