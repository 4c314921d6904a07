"""Models of several resources: times learn from memory what parameters make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from optuna.distributions import FloatDistribution
import pytest

from optuna_quota import Footprint, Usage
from optuna_quota._footprint.fit import ChainedModel
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.resource_model import fit_resource, ResourceData, ResourceModel


SPACE = {name: FloatDistribution(0.0, 1.0) for name in "abc"}


def draw_rows(n: int, seed: int, noise: float = 0.4) -> list[Observation]:
    """Return trials whose time follows a size that no column shows, and memory does."""
    generator = np.random.default_rng(seed)
    rows = []
    for params in generator.random((n, 3)):
        size = np.exp(2 * np.sin(4 * params[0]) + params[1] * params[2])
        seconds = size * np.exp(noise * generator.standard_normal())
        usage = Usage(memory=1e8 * (1 + size), cpu_time=float(seconds))
        rows.append(Observation(dict(zip("abc", params.tolist(), strict=True)), SPACE, usage))
    return rows


def with_memory(rows: Sequence[Observation], amounts: Sequence[float | None]) -> list[Observation]:
    return [
        replace(row, usage=Usage(memory=amount, cpu_time=row.usage.cpu_time))
        for row, amount in zip(rows, amounts, strict=True)
    ]


def model_of_time(rows: Sequence[Observation]) -> ResourceModel:
    model = Footprint.fit(rows).contents.models["cpu_time"]
    assert isinstance(model, ResourceModel)
    return model


def test_times_are_learned_from_fewer_trials_where_memory_repeats_itself() -> None:
    points = draw_rows(100, seed=1, noise=0.0)
    truth = np.array([row.usage.cpu_time for row in points])

    def errors(rows: Sequence[Observation]) -> list[float]:
        expected = Footprint.fit(rows).expected([row.params for row in points])["cpu_time"]
        return np.abs(np.log(expected.quantile(0.5) / truth)).tolist()

    beside, alone = [], []
    for seed in range(2, 8):
        rows = draw_rows(25, seed)
        beside += errors(rows)
        alone += errors(with_memory(rows, [None] * 25))
    assert np.median(beside) < 0.85 * np.median(alone)


def test_draws_have_the_uncertainty_of_the_peak() -> None:
    model = model_of_time(draw_rows(25, seed=0))
    assert model.data.peak is not None
    columns = np.random.default_rng(1).uniform(-1, 1, (40, 3))
    drawn = model.draw(columns, 4000, np.random.default_rng(2))
    expected = model.predict(columns)
    for share in (0.25, 0.5, 0.75):
        found = np.quantile(drawn, share, axis=0)
        assert np.median(found / expected.quantile(share)) == pytest.approx(1, abs=0.1)
    level, unknown = model.data.peak.process.predict(columns)
    assert (np.diag(model.joint(columns)[1]) >= 0).all()
    # A time that follows a peak is as uncertain as the peak is.
    certain = model.process.predict(np.column_stack([columns, level / 3**0.5]))[1]
    added = np.diag(model.joint(columns)[1]) - certain
    assert np.corrcoef(added, unknown)[0, 1] > 0.5


def test_residuals_of_a_time_are_those_without_the_trials_own_peak() -> None:
    rows = draw_rows(30, seed=3, noise=0.05)
    found = model_of_time(rows).log_leave_one_out()[0]
    away = []
    for i, row in enumerate(rows):
        others = Footprint.fit([*rows[:i], *rows[i + 1 :]]).expected([row.params])["cpu_time"]
        away.append(float(np.log((row.usage.cpu_time or 0.0) / others.quantile(0.5)[0])))
    assert np.std(found) == pytest.approx(np.std(away), rel=0.4)
    assert np.corrcoef(found, away)[0, 1] > 0.8


@pytest.mark.parametrize("kind", ["unpredictable", "constant", "sometimes unknown"])
def test_memory_that_tells_nothing_is_left_out(kind: str) -> None:
    rows = draw_rows(25, seed=0)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(25))
    amounts: list[float | None] = (1e8 * noise).tolist()
    if kind == "constant":
        amounts = [1e8] * 25
    elif kind == "sometimes unknown":
        amounts = [None, *(row.usage.memory for row in rows[1:])]
    assert model_of_time(with_memory(rows, amounts)).data.peak is None
    assert model_of_time(rows).data.peak is not None


@pytest.mark.parametrize("sign", [1.0, 0.0, -0.6], ids=["together", "independent", "opposite"])
def test_what_raises_cpu_time_may_raise_or_lower_the_ratio_of_clock_time_to_it(
    sign: float,
) -> None:
    def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        columns = generator.uniform(-1, 1, (n, 2))
        load, other = 0.1 * generator.standard_normal((2, n))
        ratio = np.exp(0.3 * columns[:, 0] + sign * load + (1 - sign**2) ** 0.5 * other)
        return columns, np.exp(columns.sum(axis=1) + load), ratio

    points, seconds, ratios = draw(500, seed=100)
    away = []
    for seed in range(4):
        columns, *amounts = draw(60, seed)
        base, ratio = (
            fit_resource(ResourceData.exact(columns, each, floors=(0.0,))) for each in amounts
        )
        model = ChainedModel("cpu_time", base, ratio)
        assert model.correlation == pytest.approx(sign, abs=0.25)
        expected = model.predict(points, base.predict(points))
        residual = np.log(seconds * ratios / expected.quantile(0.5))
        away.append(float(np.std(residual / expected.spread)))
    # Bounds are wider than the errors by 1.1 and by what few trials leave uncertain.
    assert np.mean(away) == pytest.approx(0.83, abs=0.1)
