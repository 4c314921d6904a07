"""The footprint learned from trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import math
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
import pytest

from optuna_quota import Footprint, Limits, Usage
from optuna_quota._footprint import gaussian_process, resource_model
from optuna_quota._footprint.footprint import transferred_observations
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.resource_model import ResourceModel


SPACE: dict[str, BaseDistribution] = {
    "width": IntDistribution(8, 1024, log=True),
    "depth": IntDistribution(1, 8),
    "kind": CategoricalDistribution(["a", "b"]),
}


def truth(params: dict[str, Any]) -> Usage:
    work = params["width"] ** 1.5 * params["depth"] * (2.0 if params["kind"] == "b" else 1.0)
    return Usage(memory=2e8 + 4e3 * work, wall_time=0.1 + work / 1e4)


def draw_rows(
    n: int, seed: int = 0, limits: Limits | None = None, noise: float = 0.01
) -> list[Observation]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        params = {
            "width": int(np.exp(generator.uniform(np.log(8), np.log(1024)))),
            "depth": int(generator.integers(1, 9)),
            "kind": str(generator.choice(["a", "b"])),
        }
        usage = truth(params)
        factor = float(np.exp(noise * generator.normal()))
        amounts = {name: value * factor for name, value in usage.amounts().items()}
        over = {
            name: value
            for name, value in (limits or Limits()).amounts().items()
            if amounts[name] > value
        }
        rows.append(
            Observation(params, SPACE, Usage(**{**amounts, **over}), frozenset(over or ()))
        )
    return rows


def test_floor_and_powers_are_learned_from_thirty_trials() -> None:
    footprint = Footprint.fit(draw_rows(30))
    for row in draw_rows(20, seed=1):
        table = footprint.predict(row.params)
        assert list(table.columns) == ["lower", "median", "upper"]
        expected = truth(dict(row.params))
        assert table.loc["memory", "median"] == pytest.approx(expected.memory, rel=0.15)
        assert table.loc["wall_time", "median"] == pytest.approx(expected.wall_time, rel=0.4)
        assert (table["lower"] < table["median"]).all()
        assert (table["median"] < table["upper"]).all()


@pytest.mark.parametrize("n", [6, 12, 40])
def test_upper_bounds_are_rarely_exceeded(n: int) -> None:
    held = total = 0
    for seed in range(6):
        rows = draw_rows(n + 30, seed=seed, noise=0.1)
        footprint = Footprint.fit(rows[:n])
        for row in rows[n:]:
            upper = footprint.intervals(row.params)["wall_time"].upper
            held += upper >= (row.usage.wall_time or 0.0)
            total += 1
    assert held / total >= 0.9


def test_the_probability_of_a_breach_follows_the_limits() -> None:
    footprint = Footprint.fit(draw_rows(40))
    small, large = {"width": 16, "depth": 1, "kind": "a"}, {"width": 900, "depth": 8, "kind": "b"}
    limits = Limits(memory="500MB")
    assert footprint.probability(small, limits) < 0.01
    assert footprint.probability(large, limits) > 0.99
    assert footprint.probability(large, Limits()) == 0
    assert footprint.probability(large, Limits(gpu_memory="1GB")) == 0


def test_terminated_trials_are_lower_bounds() -> None:
    limits = Limits(memory="400MB")
    rows = draw_rows(40, limits=limits)
    stopped = [row for row in rows if row.censored]
    assert len(stopped) > 8
    large = {"width": 700, "depth": 6, "kind": "b"}
    heeded = Footprint.fit(rows).intervals(large)["memory"].median
    taken = Footprint.fit(
        [Observation(row.params, row.distributions, row.usage) for row in rows]
    ).intervals(large)["memory"]
    assert heeded > 2 * taken.median
    assert Footprint.fit(rows).probability(large, limits) > 0.9


def test_times_of_trials_stopped_for_their_memory_do_not_raise_the_expected_time() -> None:
    rng = np.random.default_rng(0)
    errors: dict[str, list[float]] = {"partial": [], "censored": []}
    rows = draw_rows(40, seed=3)
    large = np.median([row.usage.memory or 0.0 for row in rows])
    noisy = [(row.usage.wall_time or 0.0) * rng.lognormal(0, 0.4) for row in rows]
    for kind, found in errors.items():
        seen = []
        for row, seconds in zip(rows, noisy, strict=True):
            over = (row.usage.memory or 0.0) > large
            usage = Usage(wall_time=seconds * (rng.uniform(0.3, 1.0) if over else 1.0))
            what: Any = {kind: frozenset({"wall_time"})} if over else {}
            seen.append(Observation(row.params, row.distributions, usage, **what))
        footprint = Footprint.fit(seen)
        for row in draw_rows(20, seed=4):
            median = footprint.intervals(row.params)["wall_time"].median
            found.append(float(np.log(median / (row.usage.wall_time or 1.0))))
    assert abs(np.median(errors["partial"])) < 0.25
    assert np.median(errors["partial"]) < np.median(errors["censored"])


@pytest.mark.parametrize(("earliest", "late"), [(0.8, True), (0.02, False)])
def test_how_late_trials_were_stopped_is_learned(earliest: float, late: bool) -> None:
    rng = np.random.default_rng(0)
    seen = []
    for row in draw_rows(40, seed=3):
        # Those over a limit on memory, which grows with width as time does.
        over = row.params["width"] * rng.lognormal(0, 0.3) > 150
        seconds = 1e-3 * row.params["width"] ** 1.5 * rng.lognormal(0, 0.2)
        usage = Usage(cpu_time=seconds * (rng.uniform(earliest, 1) if over else 1.0))
        partial = frozenset({"cpu_time"} if over else ())
        seen.append(Observation(row.params, SPACE, usage, partial=partial))

    footprint = Footprint.fit(seen)

    model = footprint.contents.models["cpu_time"]
    assert isinstance(model, ResourceModel) and (model.lateness > 1) == late
    errors = [
        math.log(footprint.intervals(row.params)["cpu_time"].median)
        - math.log(1e-3 * row.params["width"] ** 1.5)
        for row in draw_rows(30, seed=4)
    ]
    assert abs(np.median(errors)) < 0.15


@pytest.mark.parametrize(("share", "every"), [(0.001, 4), (0.03, 4), (0.02, 8)])
def test_trials_stopped_early_in_their_course_do_not_hide_what_the_others_used(
    share: float, every: int
) -> None:
    rng = np.random.default_rng(0)
    seen = []
    for i, row in enumerate(draw_rows(15 * every, seed=3)):
        seconds = 1e-3 * row.params["width"] ** 1.5 * rng.lognormal(0, 0.2)
        usage = Usage(cpu_time=seconds * (share if i % every else 1.0))
        partial = frozenset({"cpu_time"} if i % every else ())
        seen.append(Observation(row.params, SPACE, usage, partial=partial))

    footprint = Footprint.fit(seen)

    for row in draw_rows(20, seed=4):
        truth = 1e-3 * row.params["width"] ** 1.5
        found = footprint.intervals(row.params)["cpu_time"]
        assert 0.5 < found.median / truth < 2
        assert found.upper / found.lower < 10


def test_many_trials_stopped_early_do_not_outweigh_few_completed_ones() -> None:
    space: dict[str, BaseDistribution] = {"size": IntDistribution(100, 10_000, log=True)}
    rng, medians, spreads = np.random.default_rng(0), [], []
    for _ in range(3):
        seen = []
        for i in range(44):
            params = {"size": int(np.exp(rng.uniform(np.log(100), np.log(1e4))))}
            seconds = 0.06 * params["size"] * rng.lognormal(0, 0.15)
            usage = Usage(cpu_time=seconds * (0.02 * rng.uniform(0.5, 1) if i >= 4 else 1.0))
            partial = frozenset({"cpu_time"} if i >= 4 else ())
            seen.append(Observation(params, space, usage, partial=partial))
        found = Footprint.fit(seen).intervals({"size": 1000})["cpu_time"]
        medians.append(found.median / 60.0)
        spreads.append(found.upper / found.lower)

    assert min(medians) > 0.5 and max(medians) < 2
    assert np.median(spreads) < 200


def _prune(rows: list[Observation], share: float) -> list[Observation]:
    """Every third trial pruned at a share of what it would have used above 200 MB."""
    pruned = []
    for number, row in enumerate(rows):
        if number % 3 == 0:
            memory = 2e8 + share * ((row.usage.memory or 0.0) - 2e8)
            usage = Usage(memory=memory, wall_time=0.3 * (row.usage.wall_time or 0.0))
            row = replace(
                row,
                usage=usage,
                censored=frozenset({"wall_time"}),
                maybe_censored=frozenset({"memory"}),
            )
        pruned.append(row)
    return pruned


def test_peaks_of_pruned_trials_that_grow_with_the_steps_are_lower_bounds() -> None:
    rows = _prune(draw_rows(40), share=0.25)
    footprint = Footprint.fit(rows)
    for row in draw_rows(10, seed=1):
        found = footprint.intervals(row.params)["memory"]
        assert found.median == pytest.approx(row.usage.memory, rel=0.2)
    # Carried on while hyperparameters are kept, and to the next study.
    kept = Footprint.fit([*rows, *draw_rows(3, seed=2)], start=footprint, refit=False)
    again = Footprint.fit(transferred_observations(Footprint.from_json(footprint.to_json())))
    large = {"width": 700, "depth": 6, "kind": "b"}
    for other in (kept, again):
        assert other.intervals(large)["memory"].median == pytest.approx(
            truth(large).memory, rel=0.2
        )


def test_peaks_of_pruned_trials_that_were_reached_are_values() -> None:
    rows = _prune(draw_rows(40), share=1.0)
    footprint = Footprint.fit(rows)
    assert not any("memory" in point.censored for point in transferred_observations(footprint))


def test_peaks_of_pruned_trials_are_values_while_few_completed() -> None:
    rows = [
        replace(row, censored=frozenset({"wall_time"}), maybe_censored=frozenset({"memory"}))
        for row in draw_rows(12)
    ]
    footprint = Footprint.fit([*rows, *draw_rows(2, seed=1)])
    assert not any("memory" in point.censored for point in transferred_observations(footprint))


def _constant(rows: list[Observation]) -> list[Observation]:
    return [Observation(r.params, r.distributions, Usage(memory=1e9)) for r in rows]


def _zero(rows: list[Observation]) -> list[Observation]:
    return [Observation(r.params, r.distributions, Usage(gpu_time=0.0)) for r in rows]


def _collinear(rows: list[Observation]) -> list[Observation]:
    space = {**SPACE, "twin": SPACE["width"]}
    return [Observation({**r.params, "twin": r.params["width"]}, space, r.usage) for r in rows]


def _single_valued(rows: list[Observation]) -> list[Observation]:
    space = {**SPACE, "one": FloatDistribution(2.0, 2.0), "only": CategoricalDistribution(["x"])}
    return [Observation({**r.params, "one": 2.0, "only": "x"}, space, r.usage) for r in rows]


def _no_params(rows: list[Observation]) -> list[Observation]:
    return [Observation({}, {}, r.usage) for r in rows]


def _same_point(rows: list[Observation]) -> list[Observation]:
    return [Observation(rows[0].params, SPACE, r.usage) for r in rows]


def _all_stopped(rows: list[Observation]) -> list[Observation]:
    usage = Usage(memory=1e9, wall_time=3.0)
    return [Observation(r.params, SPACE, usage, frozenset({"memory", "wall_time"})) for r in rows]


def _changed_space(rows: list[Observation]) -> list[Observation]:
    wider = {**SPACE, "width": IntDistribution(1, 4096), "depth": CategoricalDistribution(["x"])}
    half = len(rows) // 2
    return rows[:half] + [
        Observation({**r.params, "depth": "x"}, wider, r.usage) for r in rows[half:]
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 25])
@pytest.mark.parametrize(
    "change",
    [
        _constant,
        _zero,
        _collinear,
        _single_valued,
        _no_params,
        _same_point,
        _all_stopped,
        _changed_space,
    ],
)
def test_degenerate_data_give_finite_predictions(
    change: Callable[[list[Observation]], list[Observation]], n: int
) -> None:
    footprint = Footprint.fit(change(draw_rows(n)))
    for params in (
        {"width": 100, "depth": 3, "kind": "a"},
        {"width": float("nan"), "kind": "never seen", "new": 3, "depth": None},
        {"width": 10**400, "depth": -5},
        {},
    ):
        table = footprint.predict(params)
        assert np.isfinite(table.to_numpy()).all()
        assert (table["lower"] <= table["median"]).all()
        assert (table["median"] <= table["upper"]).all()
        probability = footprint.probability(params, Limits(memory="2GB", wall_time=1))
        assert 0 <= probability <= 1


def test_a_constant_is_learned_from_twelve_trials() -> None:
    bounds = Footprint.fit(_constant(draw_rows(12))).intervals({})["memory"]
    assert bounds.median == pytest.approx(1e9, rel=1e-6)
    assert bounds.upper < 1.1e9


def test_a_footprint_without_trials_is_empty() -> None:
    footprint = Footprint.fit([])
    assert len(footprint.predict({"x": 1})) == 0
    assert footprint.probability({"x": 1}, Limits(memory="1GB")) == 0


@pytest.mark.parametrize("confidence", [0.5, 1.0, float("nan")])
def test_confidence_must_be_a_probability_above_a_half(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        Footprint.fit([], confidence=confidence)


def _with_idle_parameters(rows: list[Observation], seed: int) -> list[Observation]:
    generator = np.random.default_rng([seed, 1])
    names = [f"idle_{i}" for i in range(3)]
    space = {**SPACE, **{name: FloatDistribution(0.0, 1.0) for name in names}}
    return [
        replace(
            row,
            params={**row.params, **{name: float(generator.random()) for name in names}},
            distributions=space,
        )
        for row in rows
    ]


@pytest.mark.slow
def test_bounds_after_eight_trials_are_sharp_despite_idle_parameters() -> None:
    held: dict[str, list[float]] = {"memory": [], "wall_time": []}
    ratios: dict[str, list[float]] = {"memory": [], "wall_time": []}
    for seed in range(20):
        rows = _with_idle_parameters(draw_rows(48, seed=seed, noise=0.05), seed)
        expected = Footprint.fit(rows[:8]).expected([row.params for row in rows[8:]])
        for name in held:
            actual = np.array([row.usage.get(name) for row in rows[8:]], dtype=float)
            upper = expected[name].quantile(0.95)
            held[name].append(float(np.mean(upper >= actual)))
            ratios[name].append(float(np.median(upper / actual)))
    # 0.95 and 1.00 at 1.69 and 7.0; where the slope of a column was free of its length it was
    # 1.96 and 8.6.
    assert np.mean(held["memory"]) >= 0.91
    assert np.mean(held["wall_time"]) >= 0.95
    assert np.median(ratios["memory"]) <= 1.88
    assert np.median(ratios["wall_time"]) <= 7.5


def test_an_idle_column_has_a_long_length() -> None:
    rows = _with_idle_parameters(draw_rows(30, noise=0.05), 0)
    model = Footprint.fit(rows).contents.models["memory"]
    assert isinstance(model, ResourceModel)
    # Columns by name: depth, idle_0 to idle_2, kind, width.
    lengths = model.hyperparameters[3:]
    assert (lengths[1:4] > lengths[-1] + 0.5).all()


def test_fewer_trials_widen_the_bounds() -> None:
    few, many = (Footprint.fit(draw_rows(n, noise=0.3)).contents.models for n in (8, 40))
    widening = []
    for models in (few, many):
        model = models["memory"]
        assert isinstance(model, ResourceModel)
        residual, own = model.process.leave_one_out()
        flat, ratio = np.sqrt(np.mean(residual**2)), np.sqrt(np.mean((residual / own) ** 2))
        plain = 0.2 * flat + 0.8 * max(float(ratio), 0.8)
        widening.append(float(model.spread(np.ones(1))[0]) / plain)
    assert widening[0] > 1.2 * widening[1]


def test_the_widening_of_the_spread_is_common_to_all_points() -> None:
    rows = draw_rows(24, noise=0.1)
    footprint = Footprint.fit(rows[:8])
    points = [row.params for row in rows[8:]]
    drawn = np.log(footprint.draw(points, 4000, seed=0)["wall_time"])
    median = np.log(footprint.expected(points)["wall_time"].quantile(0.5))
    # Medians of draws are those of the points, and the draws of a pair rise and fall together.
    assert np.allclose(np.median(drawn, axis=0), median, atol=0.25)
    apart = drawn - drawn.mean(axis=0)
    correlation = np.corrcoef(apart.T)
    assert correlation[np.triu_indices(len(points), 1)].mean() > 0.25


def test_unlikely_floors_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [row for row in draw_rows(300, noise=0.001) if row.params["width"] > 100][:60]
    rows = [replace(row, usage=Usage(memory=row.usage.memory)) for row in wide]
    start = Footprint.fit(rows[:50])
    searched: list[int] = []
    search = gaussian_process.fit_hyperparameters

    def counted(*args: Any, **kwargs: Any) -> Any:
        searched.append(len(args[0]))
        return search(*args, **kwargs)

    monkeypatch.setattr(gaussian_process, "fit_hyperparameters", counted)
    few = Footprint.fit(rows, start=start).contents.models["memory"]
    n_few = len(searched)
    monkeypatch.setattr(resource_model, "_FLOOR_MARGIN", np.inf)
    all_beside = Footprint.fit(rows, start=start).contents.models["memory"]
    assert isinstance(few, ResourceModel)
    assert isinstance(all_beside, ResourceModel)
    assert few.floor == all_beside.floor > 0
    assert n_few < len(searched) - n_few
