"""Ray Tune's OptunaSearch, called as Ray's controller calls it: one thread that asks and tells."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
import pytest

from optuna_quota import Limits, Quota, QuotaSampler, Strategy, trial_table, Usage
from optuna_quota.testing import fake_metering, FakeMetering


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


SPACE = {"x": optuna.distributions.FloatDistribution(0, 1)}


def search_of(quota: Quota, **options: Any) -> Any:
    optuna_search = pytest.importorskip("ray.tune.search.optuna")
    sampler = QuotaSampler(RandomSampler(seed=0), quota=quota, metering=False, **options)
    return optuna_search.OptunaSearch(SPACE, metric="loss", mode="min", sampler=sampler)


def run(search: Any, metering: FakeMetering, *, at_once: int, n_samples: int = 30) -> list[str]:
    """Return the trials that a search has run, each for a second."""
    running: deque[str] = deque()
    done: list[str] = []
    is_finished, n_refused = False, 0
    while len(done) < n_samples and (running or not is_finished):
        name = str(len(done) + len(running))
        if len(running) < at_once and not is_finished:
            point = search.suggest(name)
            is_finished = point == "FINISHED"
            if isinstance(point, dict):
                running.append(name)
                continue
            n_refused += 1
            assert n_refused < 1000
        metering.advance(1)
        for name in list(running):
            search.on_trial_complete(name, {"loss": 1.0, "training_iteration": 1})
            running.remove(name)
            done.append(name)
    return done


@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"footprint": lambda params: Usage(wall_time=1.0)}])
def test_a_search_ends_with_its_quota(
    at_once: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_metering() as metering:
        search = search_of(Quota(trial_time="20s"), **options)
        done = run(search, metering, at_once=at_once)
        table = trial_table(search._ot_study)
    assert 18 <= len(done) <= 20 + at_once
    assert (table["outcome"] == "completed").sum() == len(done)
    # A temporary refusal leaves a row, but repeated calls meanwhile don't.
    assert len(table) <= len(done) + 4
    assert "The search ends here" in caplog.text


def test_a_quota_used_up_before_ends_the_search_at_once() -> None:
    search = search_of(Quota(n_trials=1))
    search._ot_study.add_trial(optuna.create_trial(value=1.0))
    search._ot_study.optimize(lambda trial: 1.0, n_trials=1)
    assert search.suggest("a") == "FINISHED"


def test_a_search_whose_points_are_all_rejected_ends() -> None:
    search = search_of(
        Quota(n_trials=99),
        limits=Limits(wall_time=1),
        footprint=lambda params: Usage(wall_time=9),
        strategy=Strategy(9, search_space=SPACE),
    )
    points = [search.suggest(str(number)) for number in range(20)]
    assert points == [None] * 19 + ["FINISHED"]
    assert set(trial_table(search._ot_study)["outcome"]) == {"rejected"}


def test_a_search_is_saved_and_restored_with_a_lambda_as_footprint(tmp_path: Path) -> None:
    search = search_of(Quota(n_trials=2), footprint=lambda params: Usage(wall_time=params["x"]))
    assert isinstance(search.suggest("a"), dict)
    search.save(str(tmp_path / "search.pkl"))
    again = search_of(Quota(n_trials=9))
    again.restore(str(tmp_path / "search.pkl"))
    again.on_trial_complete("a", {"loss": 1.0, "training_iteration": 1})
    assert isinstance(again.suggest("b"), dict)
    assert again.suggest("c") == "FINISHED"
