"""Learning from a study as it goes."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import IntDistribution
from optuna.trial import create_trial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_quota import Footprint
from optuna_quota import Limits
from optuna_quota import Usage
from optuna_quota._footprint.observations import MAX_OBSERVATIONS
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.observations import read_observation
from optuna_quota._footprint.observations import select_observations
from optuna_quota._footprint.online import Learner
from optuna_quota._footprint.online import transferred_observations
from tests.footprint_tests.test_footprint import draw_rows


def trial_of(row: Observation, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    attrs = {f"quota:{name}": value for name, value in row.usage.amounts().items()}
    return create_trial(
        state=state,
        params=dict(row.params),
        distributions=dict(row.distributions),
        user_attrs=attrs,
        value=0.0 if state == TrialState.COMPLETE else None,
    )


def test_each_finished_trial_is_read_once() -> None:
    rows = draw_rows(30)
    learner = Learner()
    trials = [trial_of(row) for row in rows]
    running = trial_of(rows[0], TrialState.RUNNING)
    assert learner.learn([]) is None
    first = learner.learn([*trials[:10], running])
    assert learner.n_observations == 10
    assert learner.learn([*trials[:10], running]) is first
    learner.learn([*trials[:11], *trials[11:]])
    assert learner.n_observations == 30


def test_rows_read_before_another_threads_are_not_read_again() -> None:
    rows = draw_rows(4, seed=1)
    ended = [trial_of(row) for row in rows]
    running = trial_of(rows[3], TrialState.RUNNING)
    learner = Learner()
    learner.learn([*ended[:3], running])
    # A thread that looked earlier comes later, with fewer rows than were read since.
    learner.learn(ended[:2])
    learner.learn(ended)
    assert learner.n_observations == 4


def test_it_comes_to_what_a_fit_from_nothing_says() -> None:
    rows = draw_rows(40)
    learner, trials = Learner(), [trial_of(row) for row in rows]
    for n in range(1, 41):
        learned = learner.learn(trials[:n])
    assert learned is not None
    fitted = Footprint.fit(rows)
    for row in draw_rows(10, seed=3):
        one, two = (f.intervals(row.params)["memory"].median for f in (learned, fitted))
        assert one == pytest.approx(two, rel=0.1)


def test_an_earlier_study_starts_the_next_one_and_is_corrected_by_it() -> None:
    earlier = Footprint.fit(draw_rows(40))
    learner = Learner(earlier)
    params = {"width": 500, "depth": 4, "kind": "b"}
    assert learner.learn([]) is earlier
    # The other machine takes three times as long.
    slower = [
        Observation(r.params, r.distributions, Usage(wall_time=3 * (r.usage.wall_time or 0)))
        for r in draw_rows(6, seed=7)
    ]
    learned = learner.learn([trial_of(row) for row in slower])
    assert learned is not None
    before = earlier.intervals(params)["wall_time"].median
    assert learned.intervals(params)["wall_time"].median == pytest.approx(3 * before, rel=0.5)
    copied = Learner(Footprint.from_json(earlier.to_json()))
    again = copied.learn([trial_of(row) for row in slower])
    assert again is not None
    assert again.intervals(params) == learned.intervals(params)


def test_rows_of_an_earlier_study_give_the_same_columns() -> None:
    earlier = Footprint.fit(draw_rows(12))
    again = Footprint.fit(transferred_observations(earlier))
    params = draw_rows(1, seed=9)[0].params
    names = [part.name for part in again.contents.features.parts]
    assert names == ["depth", "kind", "quota:earlier", "width"]
    one = earlier.contents.features.encode([params])[0]
    two = again.contents.features.encode([params])[0]
    assert np.allclose(np.delete(two, 2), one)


@pytest.mark.parametrize("cap", [10, 40, 100])
def test_of_many_rows_the_newest_and_the_extremes_are_kept(cap: int) -> None:
    rows = draw_rows(500)
    numbers = {id(row): number for number, row in enumerate(rows)}
    kept = [numbers[id(row)] for row in select_observations(rows, cap)]
    assert len(kept) <= cap
    assert kept == sorted(set(kept))
    assert set(range(500 - cap // 2 if cap < 80 else 460, 500)) <= set(kept)
    older = rows[: 500 - min(cap // 2, 40)]
    largest = max(range(len(older)), key=lambda i: older[i].usage.memory or 0)
    least = min(range(len(older)), key=lambda i: older[i].usage.memory or 0)
    assert {largest, least} <= set(kept)
    assert select_observations(rows[:7], cap) == rows[:7]


def test_five_thousand_trials_are_no_burden() -> None:
    rows = draw_rows(200)
    trials = [trial_of(row) for row in rows] * 25
    learner = Learner()
    footprint = learner.learn(trials)
    assert footprint is not None
    assert learner.n_observations == 5_000
    assert len(footprint.points) <= MAX_OBSERVATIONS


def row_of(state: TrialState, attrs: dict[str, Any]) -> Observation | None:
    usage = {"quota:memory": 1e9, "quota:wall_time": 5.0, "quota:cpu_time": 4.0}
    trial = create_trial(
        state=state,
        params={"x": 1},
        distributions={"x": IntDistribution(0, 3)},
        value=1.0 if state == TrialState.COMPLETE else None,
        user_attrs={**usage, **attrs},
    )
    return read_observation(trial)


def breach(resource: str, limit: float, **more: Any) -> dict[str, Any]:
    found = {"resource": resource, "limit": limit, "observed": limit, "seconds": 5.0, **more}
    return {"quota:outcome": "terminated", "quota:breach": found}


TIMES = frozenset({"wall_time", "cpu_time"})


@pytest.mark.parametrize(
    ("state", "attrs", "censored"),
    [
        (TrialState.COMPLETE, {}, frozenset()),
        (TrialState.PRUNED, {"quota:outcome": "pruned"}, TIMES),
        (TrialState.PRUNED, breach("memory", 9e8), TIMES | {"memory"}),
        (TrialState.PRUNED, breach("wall_time", 5.0), TIMES),
        (TrialState.FAIL, {"quota:outcome": "failed"}, TIMES | {"memory"}),
    ],
)
def test_what_was_stopped_is_a_lower_bound(
    state: TrialState, attrs: dict[str, Any], censored: frozenset[str]
) -> None:
    row = row_of(state, attrs)
    assert row is not None
    assert row.censored == censored


def test_a_trial_stopped_on_its_way_to_a_limit_would_have_reached_it() -> None:
    row = row_of(TrialState.PRUNED, breach("memory", 3e9, forecast=True))
    assert row is not None
    assert row.usage.memory == 3e9
    assert row.usage.wall_time == 5.0


@pytest.mark.parametrize(
    ("state", "attrs"),
    [
        (TrialState.RUNNING, {}),
        (TrialState.PRUNED, {"quota:outcome": "rejected"}),
        (
            TrialState.COMPLETE,
            {"quota:memory": None, "quota:wall_time": "x", "quota:cpu_time": -1},
        ),
    ],
)
def test_some_rows_teach_nothing(state: TrialState, attrs: dict[str, Any]) -> None:
    assert row_of(state, attrs) is None


def test_a_limit_learned_in_the_study_is_known_to_its_footprint() -> None:
    rows = draw_rows(40, limits=Limits(memory="400MB"))
    trials = []
    for row in rows:
        trial = trial_of(row, TrialState.PRUNED if row.censored else TrialState.COMPLETE)
        if row.censored:
            trial.user_attrs.update(breach("memory", 4e8))
        trials.append(trial)
    learned = Learner().learn(trials)
    assert learned is not None
    large = {"width": 700, "depth": 6, "kind": "b"}
    assert learned.probability(large, Limits(memory="400MB")) > 0.9


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return a list that grows by the trials, and whether it searched, with every fit."""
    fits: list[tuple[int, bool]] = []
    fit = Footprint.fit

    def counted(rows: list[Observation], **options: Any) -> Footprint:
        fits.append((len(rows), options["refit"]))
        return fit(rows, **options)

    monkeypatch.setattr(Footprint, "fit", counted)
    return fits


def test_the_more_trials_are_known_the_fewer_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = count_fits(monkeypatch)
    learner, trials = Learner(), [trial_of(row) for row in draw_rows(100)]
    for n in range(1, 101):
        learner.learn(trials[:n])
    counts = [n for n, _ in fits]
    assert counts[:8] == list(range(1, 9))
    assert len([n for n in counts if n > 50]) <= 10
    assert len([n for n, searched in fits if searched and n > 8]) <= 15
    assert counts[-1] > 90


def test_the_newest_trials_are_in_what_is_asked_for_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = count_fits(monkeypatch)
    learner, trials = Learner(), [trial_of(row) for row in draw_rows(31)]
    learner.learn(trials[:30])
    before = learner.learn(trials)
    assert len(fits) == 1
    after = learner.learn(trials, fresh=True)
    assert after is not before
    assert [n for n, _ in fits] == [30, 31]
    assert learner.learn(trials, fresh=True) is after


def expecting(trial: FrozenTrial, upper: float, lower: float = 0.0) -> FrozenTrial:
    figures = {"lower": lower, "median": (lower + upper) / 2, "upper": upper}
    trial.user_attrs["quota:footprint"] = {"memory": figures}
    return trial


@pytest.mark.parametrize(("factor", "fits_again"), [(2.0, False), (0.5, True)])
def test_a_trial_that_used_more_than_projected_is_learned_from_at_once(
    monkeypatch: pytest.MonkeyPatch, factor: float, fits_again: bool
) -> None:
    fits = count_fits(monkeypatch)
    rows = draw_rows(31)
    learner, trials = Learner(), [trial_of(row) for row in rows]
    learner.learn(trials[:30])
    expecting(trials[30], upper=factor * (rows[30].usage.memory or 0.0))
    learner.learn(trials)
    assert (len(fits) == 2) is fits_again


def test_a_bound_below_what_was_projected_is_no_surprise() -> None:
    attrs = breach("memory", 9e8)
    footprint = {"quota:footprint": {"memory": {"lower": 2e9, "median": 3e9, "upper": 4e9}}}
    stopped = row_of(TrialState.PRUNED, {**attrs, **footprint})
    done = row_of(TrialState.COMPLETE, {"quota:outcome": "completed", **footprint})
    assert stopped is not None
    assert done is not None
    assert not stopped.is_surprise
    assert done.is_surprise


def test_what_can_not_be_fitted_is_not_tried_again_with_every_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = []

    def fails(rows: list[Observation], **_: Any) -> Footprint:
        tries.append(len(rows))
        raise np.linalg.LinAlgError("A covariance must be finite.")

    monkeypatch.setattr(Footprint, "fit", fails)
    learner, trials = Learner(), [trial_of(row) for row in draw_rows(40)]
    for n in range(1, 41):
        try:
            learner.learn(trials[:n])
        except np.linalg.LinAlgError:
            continue
    assert len([n for n in tries if n > 20]) <= 10
