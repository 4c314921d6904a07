"""Learning the footprint of a running study."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.trial import create_trial, FrozenTrial, TrialState
import pytest

from optuna_quota import Footprint, Limits, Usage
from optuna_quota._footprint.footprint import Learner, transferred_observations
from optuna_quota._footprint.observations import MAX_OBSERVATIONS, Observation
from tests.footprint_tests.test_footprint import draw_rows
from tests.footprint_tests.test_observations import breach


def trial_of(row: Observation, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    attrs = {f"quota:{name}": value for name, value in row.usage.amounts().items()}
    return create_trial(
        state=state,
        params=dict(row.params),
        distributions=dict(row.distributions),
        user_attrs=attrs,
        value=0.0 if state == TrialState.COMPLETE else None,
    )


def test_a_trial_that_was_rejected_says_nothing_of_isolation() -> None:
    trials = [trial_of(row) for row in draw_rows(2)]
    trials[0].user_attrs["quota:isolation"] = "process"
    trials[1].user_attrs = {"quota:outcome": "rejected"}
    learner = Learner()
    learner.learn(trials)
    assert learner.isolated


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


def test_a_thread_with_older_rows_reads_none_twice() -> None:
    rows = draw_rows(4, seed=1)
    ended = [trial_of(row) for row in rows]
    running = trial_of(rows[3], TrialState.RUNNING)
    learner = Learner()
    learner.learn([*ended[:3], running])
    # A thread that looked earlier comes later, with fewer rows than were read since.
    learner.learn(ended[:2])
    learner.learn(ended)
    assert learner.n_observations == 4


def test_learning_step_by_step_equals_a_fit_from_scratch() -> None:
    rows = draw_rows(40)
    learner, trials = Learner(), [trial_of(row) for row in rows]
    for n in range(1, 41):
        learned = learner.learn(trials[:n])
    assert learned is not None
    fitted = Footprint.fit(rows)
    for row in draw_rows(10, seed=3):
        one, two = (f.intervals(row.params)["memory"].median for f in (learned, fitted))
        assert one == pytest.approx(two, rel=0.1)


def test_an_earlier_study_is_the_prior_of_the_next_one() -> None:
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


def test_transferred_observations_have_the_same_columns() -> None:
    earlier = Footprint.fit(draw_rows(12))
    again = Footprint.fit(transferred_observations(earlier))
    params = draw_rows(1, seed=9)[0].params
    names = [part.name for part in again.contents.features.parts]
    assert names == ["depth", "kind", "quota:earlier", "width"]
    one = earlier.contents.features.encode([params])[0]
    two = again.contents.features.encode([params])[0]
    assert np.allclose(np.delete(two, 2), one)


@pytest.mark.slow
def test_five_thousand_trials_are_thinned() -> None:
    rows = draw_rows(200)
    trials = [trial_of(row) for row in rows] * 25
    learner = Learner()
    footprint = learner.learn(trials)
    assert footprint is not None
    assert learner.n_observations == 5_000
    assert len(footprint.points) <= MAX_OBSERVATIONS


def test_terminated_trials_raise_the_probability_of_a_breach() -> None:
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


def test_fits_become_rarer_as_the_study_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = count_fits(monkeypatch)
    learner, trials = Learner(), [trial_of(row) for row in draw_rows(100)]
    for n in range(1, 101):
        learner.learn(trials[:n])
    counts = [n for n, _ in fits]
    assert counts[:8] == list(range(1, 9))
    assert len([n for n in counts if n > 50]) <= 10
    assert len([n for n, searched in fits if searched and n > 8]) <= 15
    assert counts[-1] > 90


def test_a_fresh_footprint_includes_the_newest_trials(
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
def test_usage_above_the_projection_causes_a_fit_at_once(
    monkeypatch: pytest.MonkeyPatch, factor: float, fits_again: bool
) -> None:
    fits = count_fits(monkeypatch)
    rows = draw_rows(31)
    learner, trials = Learner(), [trial_of(row) for row in rows]
    learner.learn(trials[:30])
    expecting(trials[30], upper=factor * (rows[30].usage.memory or 0.0))
    learner.learn(trials)
    assert (len(fits) == 2) is fits_again


def test_a_failing_fit_is_not_retried_with_every_trial(
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
