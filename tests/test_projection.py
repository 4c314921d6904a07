"""Whether a strategy fits its quota."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
import heapq
import pickle
import time
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
import pytest

from optuna_quota import Limits, project, Quota, Strategy, Usage
from optuna_quota._projection.simulation import _schedule


EACH = Usage(memory=2e9, wall_time=90.0, cpu_time=180.0)


@pytest.mark.parametrize(
    ("strategy", "resource", "total"),
    [
        (Strategy(200), "n_trials", 200),
        (Strategy(200), "wall_time", 18_000),
        (Strategy(200, n_jobs=2), "wall_time", 9_000),
        (Strategy(201, n_jobs=2), "wall_time", 9_090),
        (Strategy(200, n_jobs=2), "trial_time", 18_000),
        (Strategy(200, n_jobs=2), "cpu_time", 36_000),
        (Strategy(200, n_jobs=2), "memory", 4e9),
        (Strategy(200, n_jobs=2), "cpu_cores", 4),
        (Strategy(1, n_jobs=8), "memory", 2e9),
        (Strategy(20_000), "wall_time", 1_800_000),
    ],
)
def test_a_constant_footprint_adds_up_exactly(
    strategy: Strategy, resource: str, total: float
) -> None:
    row = project(strategy, EACH).table.loc[resource]
    assert row["lower"] == row["median"] == row["upper"] == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(
    ("quota", "fits"),
    [
        (Quota(wall_time=9_000), True),
        (Quota(wall_time=8_999), False),
        (Quota(memory=4e9), True),
        (Quota(memory=3.9e9), False),
        (Quota(n_trials=200), True),
        (Quota(n_trials=199), False),
        (Quota(cost=10, prices={"cpu_time": 1}), True),
        (Quota(cost=9, prices={"cpu_time": 1}), False),
        (Quota(), True),
    ],
    ids=repr,
)
def test_exactly_at_the_quota_fits_and_over_it_does_not(quota: Quota, fits: bool) -> None:
    projection = project(Strategy(200, n_jobs=2), EACH, quota=quota)
    assert projection.fits is fits
    assert projection.probability == float(fits)


def test_rejection_names_each_resource_that_does_not_fit() -> None:
    quota = Quota(wall_time="1h", memory="3GB", cpu_time="20h")
    text = str(project(Strategy(200, n_jobs=2), EACH, quota=quota))
    assert "wall time: 2 h 30 min projected, quota 1 h, probability 0%" in text
    assert "memory: 3.73 GiB projected, quota 2.79 GiB, probability 0%" in text
    assert "CPU time" not in text
    assert "Nearest that would fit: 40 trials instead of 200, 1 at once instead of 2." in text
    one = str(project(Strategy(2000), EACH, quota=Quota(n_trials=1)))
    assert "Nearest that would fit: 1 trial instead of 2,000." in one


def test_few_trials_of_very_many_that_fit_are_found() -> None:
    each = Usage(wall_time=100, memory="1GiB")
    quota = Quota(wall_time=250, memory="2GiB")
    projection = project(Strategy(20_000, n_jobs=2), each, quota=quota)
    assert projection.nearest == Strategy(4, n_jobs=2)


def test_a_quota_used_up_does_not_fit_even_if_the_rest_is_unknown() -> None:
    quota = Quota(cpu_time=5, gpu_time=5)
    found = project(Strategy(9), Usage(memory=1e9), quota=quota, used={"cpu_time": 50})
    assert not found.fits and found.nearest is None
    assert [row.resource for row in found.unfit] == ["cpu_time"]
    assert "CPU time: unknown usage, 50 s of it used so far, quota 5 s" in str(found)
    assert [row.resource for row in found.not_judged] == ["gpu_time"]


@pytest.mark.parametrize("confidence", [0.5, 1.0, 95])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="`confidence` must be above 0.5 and below 1"):
        project(Strategy(9), EACH, confidence=confidence)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strategy", 9),
        ("quota", Limits(wall_time=1)),
        ("limits", {}),
        ("confidence", "0.9"),
        ("used", 5),
        ("used", {1: 5}),
        ("points", [5]),
    ],
)
def test_arguments_of_the_wrong_type(name: str, value: Any) -> None:
    given: dict[str, Any] = {"strategy": Strategy(9), "footprint": EACH, name: value}
    with pytest.raises(TypeError, match=f"`{name}` must .* but got"):
        project(**given)


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf")])
def test_what_was_used_is_an_amount(amount: float) -> None:
    with pytest.raises(ValueError, match=r"`used\['cpu_time'\]` must be nonnegative and finite"):
        project(Strategy(9), EACH, used={"cpu_time": amount})


def test_what_was_used_is_of_known_resources() -> None:
    with pytest.raises(ValueError, match="`used` must be of n_trials, .* but got 'walltime'"):
        project(Strategy(9), EACH, used={"walltime": 5})


def test_the_text_of_a_resumed_study_says_further_trials() -> None:
    used = {"n_trials": 10, "wall_time": 600.0}
    text = str(project(Strategy(90), EACH, quota=Quota(wall_time="1h"), used=used))
    assert text.startswith("A strategy of 90 further trials does not fit its quota")
    assert "Nearest that would fit: 33 further trials instead of 90." in text


@pytest.mark.parametrize(
    ("quota", "nearest"),
    [
        (Quota(memory=2e9), Strategy(200, n_jobs=1)),
        (Quota(wall_time=4_500), Strategy(100, n_jobs=2)),
        (Quota(n_trials=7), Strategy(7, n_jobs=2)),
        (Quota(memory=1e9), None),
        (Quota(wall_time=9_000), None),
    ],
    ids=repr,
)
def test_the_nearest_strategy_keeps_most(quota: Quota, nearest: Strategy | None) -> None:
    projection = project(Strategy(200, n_jobs=2), EACH, quota=quota)
    assert projection.nearest == nearest
    if nearest is not None:
        assert project(nearest, EACH, quota=quota).fits


def test_the_nearest_strategy_may_have_a_smaller_range() -> None:
    space = {
        "rows": IntDistribution(1_000, 1_000_000, log=True),
        "rate": FloatDistribution(0.1, 1.0),
    }
    strategy = Strategy(100, search_space=space)
    quota = Quota(memory="0.8GB")
    projection = project(strategy, lambda p: Usage(memory=1_000.0 * p["rows"]), quota=quota)
    near = projection.nearest
    assert near is not None and near.search_space is not None and near.n_trials == 100
    assert near.search_space["rate"] == space["rate"]
    assert 700_000 < near.search_space["rows"].high <= 820_000  # type: ignore[attr-defined]
    assert "rows from 1000 to" in str(projection)


def test_a_trial_over_its_limit_counts_as_terminated_there() -> None:
    strategy, limits = Strategy(10), Limits(wall_time=60)
    assert project(strategy, EACH, limits=limits).table.loc["wall_time", "upper"] == 600


def test_earlier_usage_counts_for_totals() -> None:
    used = {"wall_time": 100.0, "n_trials": 5}
    table = project(Strategy(10), EACH, quota=Quota(wall_time=1_000), used=used).table
    assert table.loc["wall_time", "median"] == 1_000
    assert table.loc["wall_time", "used"] == 100
    assert table.loc["wall_time", "probability"] == 1
    assert table.loc["n_trials", "median"] == 15


def test_a_quota_on_an_unknown_usage_is_not_judged() -> None:
    projection = project(Strategy(10), EACH, quota=Quota(energy="1kWh"))
    assert projection.fits
    assert "energy: unknown usage, quota 1 kWh" in str(projection)


def test_the_same_seed_gives_the_same_projection_and_it_can_be_pickled() -> None:
    strategy = Strategy(30, search_space={"x": FloatDistribution(0.1, 10.0)})
    quota = Quota(trial_time=150)
    one, two = (
        project(strategy, lambda p: Usage(wall_time=p["x"]), quota=quota) for _ in range(2)
    )
    assert one == two == pickle.loads(pickle.dumps(one))
    assert 0 < one.probability < 1


def test_a_function_needs_a_search_space() -> None:
    with pytest.raises(ValueError, match="search_space"):
        project(Strategy(3), lambda p: Usage(wall_time=p["x"]))


def test_a_footprint_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="Usage, a function"):
        project(Strategy(3), 7)


def _uneven(params: dict[str, Any]) -> Usage:
    return Usage(wall_time=100.0 if params["i"] == 0 else 1.0)


def test_as_many_points_as_trials_run_once_each_and_others_are_sampled() -> None:
    known = project(Strategy(50), _uneven, points=[{"i": i} for i in range(50)])
    row = {r.resource: r for r in known.resources}["trial_time"]
    assert row.lower == row.median == row.upper == pytest.approx(149)
    sampled = project(Strategy(50), _uneven, points=[{"i": i} for i in range(100)])
    row = {r.resource: r for r in sampled.resources}["trial_time"]
    # The expensive point comes never, once or twice: only with replacement can it come twice.
    assert row.lower == pytest.approx(50)
    assert row.upper > 240


def test_a_trial_stopped_at_a_limit_uses_that_share_of_all_its_totals() -> None:
    each = Usage(wall_time=600.0, cpu_time=1_200.0, energy=60.0, memory=1e9)
    quota = Quota(cpu_time=1_200, cpu_cores=2)
    projection = project(Strategy(10), each, quota=quota, limits=Limits(wall_time=60))
    assert projection.fits
    medians = projection.table["median"]
    assert medians[["wall_time", "cpu_time", "energy"]].tolist() == [600, 1_200, 60]
    assert medians["cpu_cores"] == pytest.approx(2)
    assert medians["memory"] == 1e9


def test_a_cost_is_unknown_without_a_known_priced_resource() -> None:
    quota = Quota(cost=1, prices={"gpu_time": 100})
    projection = project(Strategy(10), EACH, quota=quota)
    assert projection.table["probability"].isna()["cost"]
    assert "cost: unknown usage, quota 1" in str(projection)


def test_unknown_usage_at_some_points_adds_nothing() -> None:
    def footprint(params: Mapping[str, Any]) -> Usage:
        return Usage(wall_time=10.0, gpu_memory=1e9 if params["device"] == "gpu" else None)

    space = {"device": CategoricalDistribution(["cpu", "gpu"])}
    quota = Quota(gpu_memory="2GB", wall_time=100)
    projection = project(Strategy(10, search_space=space), footprint, quota=quota)
    assert projection.fits
    assert projection.table.loc["gpu_memory", "upper"] == 1e9


@pytest.mark.parametrize("n_jobs", [8, 16, 40, 100])
def test_the_nearest_strategy_has_as_many_jobs_as_fit(n_jobs: int) -> None:
    each, quota = Usage(memory="1GiB", wall_time=10), Quota(memory="7GiB")
    strategy = Strategy(150, n_jobs=n_jobs)
    assert project(strategy, each, quota=quota).nearest == Strategy(150, n_jobs=7)


@pytest.mark.parametrize("seed", range(6, 10))
def test_the_nearest_of_uncertain_strategies_fits_when_projected_itself(seed: int) -> None:
    strategy = Strategy(200, search_space={"x": IntDistribution(5, 50)})
    quota = Quota(trial_time=2_000)

    def projected(strategy: Strategy) -> Any:
        return project(strategy, lambda p: Usage(wall_time=p["x"]), quota=quota, seed=seed)

    near = projected(strategy).nearest
    assert near.n_trials < 200 and near.search_space == strategy.search_space
    assert projected(near).fits
    assert not projected(replace(near, n_trials=near.n_trials + 1)).fits


def test_a_notebook_shows_conclusion_table_and_nearest() -> None:
    shown = project(Strategy(9), Usage(wall_time=1), quota=Quota(trial_time=5))
    page = shown._repr_html_()
    assert "does not fit its quota" in page and "Nearest that would fit: 5 trials" in page
    assert page.count("<tr>") == 1 + len(shown.resources) and ">9 s</td>" in page


def test_a_projection_without_any_known_usage_claims_nothing() -> None:
    projection = project(Strategy(10), Usage(wall_time=1.0), quota=Quota(memory="1GiB"))

    assert "as far as known: probability unknown" in str(projection)
    some = project(Strategy(10), Usage(wall_time=1.0), quota=Quota(memory="1GiB", wall_time=100))
    assert "as far as known: probability 100% without memory" in str(some)
    assert "unknown usage" in str(some)


@pytest.mark.parametrize("n_jobs", [1, 3, 7, 17, 64, 150, 999])
def test_each_trial_is_scheduled_on_the_worker_that_is_free_first(n_jobs: int) -> None:
    generator = np.random.default_rng(n_jobs)
    durations = generator.integers(1, 1000, (2, 150)) + generator.random((2, 150))
    memory = generator.integers(1, 1000, (2, 150)).astype(float)
    ends, peaks = _schedule(durations, {"memory": memory}, n_jobs)
    for row in range(2):
        # The last trial of each worker goes on holding its memory, until another takes its place.
        workers = [(0.0, worker) for worker in range(min(n_jobs, 150))]
        held, latest, peak = dict.fromkeys(range(n_jobs), 0.0), 0.0, 0.0
        for trial in range(150):
            free_at, worker = heapq.heappop(workers)
            end = free_at + float(durations[row, trial])
            heapq.heappush(workers, (end, worker))
            held[worker] = float(memory[row, trial])
            latest, peak = max(latest, end), max(peak, sum(held.values()))
            assert (ends[row, trial], peaks["memory"][row, trial]) == (latest, peak)


def test_thousands_of_workers_take_little_longer_than_one() -> None:
    durations = np.random.default_rng(0).random((200, 2000))

    def seconds(n_jobs: int) -> float:
        began = time.process_time()
        _schedule(durations, {"memory": durations}, n_jobs)
        return time.process_time() - began

    # Twice as long; 14 times where each trial looks through all of them.
    assert min(seconds(2000) for _ in range(3)) < 6 * min(seconds(1) for _ in range(3))
