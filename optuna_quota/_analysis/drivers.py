"""Which hyperparameters drive a resource: rank correlations, and shares of its variance.

Numbers have Spearman's ρ with the interval of Bonett and Wright (Psychometrika 65, 2000):
``tanh(atanh(ρ) ± z · sqrt((1 + ρ²/2) / (n − 3)))``. Categories have the Kruskal-Wallis test and
its effect size ε² = H / (n − 1) (Tomczak and Tomczak, Trends in Sport Sciences 21, 2014), with
the interval from inverting the noncentral χ² distribution of H. All p-values of a study are
adjusted together by Holm's method, which bounds the probability of any false claim under any
dependence.

The share of a parameter is its main effect in a functional analysis of variance of the logarithm
of the usage over the range searched (Sobol, Mathematics and Computers in Simulation 55, 2001):
``Var(E[f | x]) / (Var(f) + noise)``, estimated by ε² of the choices, or of bins, of all parameters
together over a Latin hypercube. Without the noise, the only parameter of a study would have all of
the variance even if it did nothing. Intervals are those of draws of the whole function from the
footprint's process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_quota._footprint.fit import ChainedModel, Model
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.numerics import invert, product, square_root
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._footprint.search_space import latin_hypercube, points_from_unit_cube
from optuna_quota._table import DataFrame
from optuna_quota._units import is_number
from optuna_quota._utilization.data import Parameter, StudyData
from optuna_quota._utilization.model import holm


Array = NDArray[np.float64]

_FIGURES = ("rho", "lower", "upper", "p_value")
_COLUMNS = ("param", "resource", *_FIGURES, "p_adjusted", "n", "measure", "branch")
# Fewer trials are not tested: at n = 8 only |rho| > 0.74 passes a single test at 5%.
MIN_TESTED = 8
_Z95 = 1.959963984540054
# Fewer trials that were observed to their end have no shares.
_MIN_OBSERVED = 10
_POINTS = 400
_DRAWS = 60
_BINS = 8
# A parameter with more values is divided into bins.
_MAX_CHOICES = 40
_MAX_GROUPS = 200
_QUANTILES = (0.05, 0.5, 0.95)
# A parameter is reported if its share of a resource's variance is most likely above this.
_MIN_SHARE = 0.02
_MIN_FACTOR = 1.05


def correlations(data: StudyData) -> DataFrame:
    """Return a row for every parameter and resource, the strongest of each resource first.

    Figures are NaN where fewer than eight trials are known or the parameter or usage never varied;
    ``n`` is given all the same. A conditional parameter is tested among the trials that have it,
    which ``branch`` names.
    """
    import pandas as pd

    rows = []
    for resource in data.resources:
        found = [_row(data, parameter, resource) for parameter in data.parameters]
        rows += sorted(found, key=lambda row: (math.isnan(row["rho"]), -abs(row["rho"])))
    table: DataFrame = pd.DataFrame(rows, columns=list(_COLUMNS))
    table["p_adjusted"] = holm(table["p_value"].to_numpy(dtype=float))
    return table


def _row(data: StudyData, parameter: Parameter, resource: str) -> dict[str, Any]:
    kept = data.ranked(resource) & parameter.active
    x, y = parameter.values[kept], data.amounts(resource)[kept]
    figures = dict.fromkeys(_FIGURES, math.nan)
    if len(x) >= MIN_TESTED and (x != x[0]).any() and (y != y[0]).any():
        figures = _epsilon_squared(x, y) if parameter.levels else spearman(x, y)
    return {
        "param": parameter.name,
        "resource": resource,
        **figures,
        "n": len(x),
        "measure": "epsilon2" if parameter.levels else "rho",
        "branch": parameter.branch,
    }


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    """Return ρ of two variables that vary, shape ``(n,)``, with its interval and p-value."""
    from scipy import special, stats

    n = len(x)
    rho = float(np.clip(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1], -1, 1))
    # At |rho| = 1 the interval and the p-value are degenerate, so take half a swap of neighbours
    # off. One swap lowers rho by 12 / (n (n² - 1)).
    most = 1 - 6 / (n * (n * n - 1))
    near = float(np.clip(rho, -most, most))
    half = _Z95 * math.sqrt((1 + near**2 / 2) / (n - 3))
    t = near * math.sqrt((n - 2) / (1 - near**2))
    return {
        "rho": rho,
        "lower": min(math.tanh(math.atanh(near) - half), rho),
        "upper": max(math.tanh(math.atanh(near) + half), rho),
        "p_value": float(2 * special.stdtr(n - 2, -abs(t))),
    }


def _epsilon_squared(codes: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    from scipy import special, stats

    n, groups = len(y), [y[codes == code] for code in np.unique(codes)]
    h, df = float(stats.kruskal(*groups).statistic), len(groups) - 1
    # The noncentralities at which H is that high, or that low, with probability 2.5%.
    # None where H is too low for any.
    found = (max(0.0, float(special.chndtrinc(h, df, q))) for q in (0.975, 0.025))
    lower, upper = (each / (n - 1) for each in found)
    effect = h / (n - 1)
    return {
        "rho": effect,
        "lower": min(lower, effect),
        "upper": min(max(upper, effect), 1.0),
        "p_value": float(special.chdtrc(df, h)),
    }


def claims(table: DataFrame) -> list[dict[str, Any]]:
    """Return the rows whose adjusted p-value is below 5%, in their order."""
    rows: list[dict[str, Any]] = table[table["p_adjusted"] < 0.05].to_dict("records")
    return rows


@dataclass(frozen=True)
class Driver:
    """One hyperparameter and one resource, each figure as lower, median and upper (90%)."""

    param: str
    share: tuple[float, float, float]  # of the variance of the log of the usage, noise included
    # Factor on the usage if only this parameter changes at the best trial; None for a category, if
    # the change is out of the range, or without a best trial.
    factor: tuple[float, float, float] | None
    change: float = 2.0  # what the parameter is multiplied by; 0.5 where 2 is out of the range

    @property
    def is_clear(self) -> bool:
        """Whether the share is most likely above zero."""
        return self.share[0] >= _MIN_SHARE

    @property
    def clear_factor(self) -> tuple[float, float, float] | None:
        """The factor if it most likely differs from 1 by more than a few percent, else None."""
        if self.factor is None:
            return None
        lower, _, upper = self.factor
        return self.factor if lower > _MIN_FACTOR or upper < 1 / _MIN_FACTOR else None


def cost_drivers(
    footprint: Footprint, best: Mapping[str, Any] | None
) -> dict[str, tuple[Driver, ...]]:
    """Return the drivers of each resource with enough trials, the largest share first."""
    contents = footprint.contents
    names = [part.name for part in contents.features.parts if part.width]
    if not names:
        return {}
    space = contents.features.distributions()
    unit = latin_hypercube(_POINTS, len(space), np.random.default_rng(0))
    points = points_from_unit_cube(space, unit)
    changes = {name: _change(space[name], (best or {}).get(name)) for name in names}
    place = {name: i for i, name in enumerate(n for n in names if changes[n])}
    more = [{**best, name: changes[name] * best[name]} for name in place] if best else []
    columns = contents.features.encode([*points, *([best] if best else []), *more])
    most = max(2, _MAX_GROUPS // len(names))
    groups = [
        _groups([point[name] for point in points], unit[:, list(space).index(name)], most)
        for name in names
    ]
    found = {}
    for resource, model in contents.models.items():
        part = model.base if isinstance(model, ChainedModel) else model
        if (~part.censored).sum() < _MIN_OBSERVED:
            continue
        logs, noise = log_draws(model, columns, _DRAWS)
        drivers = []
        for name, shares in zip(names, _shares(groups, logs[:, :_POINTS], noise), strict=True):
            share, factor = _quantiles(shares), None
            if name in place:
                more_used = logs[:, _POINTS + 1 + place[name]] - logs[:, _POINTS]
                factor = _quantiles(np.exp(np.clip(more_used, -50, 50)))
            drivers.append(Driver(name, share, factor, changes[name] or 2.0))
        found[resource] = tuple(sorted(drivers, key=lambda d: -d.share[1]))
    return found


def _quantiles(values: Array) -> tuple[float, float, float]:
    lower, median, upper = np.quantile(values, _QUANTILES).tolist()
    return lower, median, upper


def _change(space: Any, value: Any) -> float:
    """Return by how much a value can be multiplied within its range; 0 where it can't."""
    if not is_number(value) or not hasattr(space, "high") or value <= 0:
        return 0.0
    return 2.0 if value <= space.high / 2 else 0.5 if value >= 2 * space.low else 0.0


def _groups(values: Sequence[Any], unit: Array, most: int) -> NDArray[np.int64]:
    """Return a group of each point: its choice, or its bin where there are many values."""
    texts = [repr(value) for value in values]  # a choice may not be hashable
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if len(place) <= min(most, _MAX_CHOICES):
        return np.array([place[text] for text in texts])
    bins = min(most, _BINS)
    return np.asarray(np.minimum((unit * bins).astype(np.int64), bins - 1))


def _shares(groups: Sequence[NDArray[np.int64]], f: Array, noise: Array) -> list[Array]:
    """Return ε² of the groups of each parameter, 0 on average without effect, in each draw.

    The effects on draws ``f``, shape ``(n_draws, n_points)``, are fitted together, and their
    chance covariance is left out of the total: one at a time, each would have a part of the
    others'.
    """
    f = f - f.mean(axis=1, keepdims=True)
    hot = [np.eye(group.max() + 1)[group] for group in groups]
    hot = [each - each.mean(axis=0) for each in hot]
    n, sizes = f.shape[1], [each.shape[1] for each in hot]
    x = np.hstack(hot)
    # The effects of a parameter sum to any constant: a small ridge makes it zero.
    inverse, _ = invert(product(x.T, x) + 1e-10 * n * np.eye(x.shape[1]))
    effects = np.split(product(inverse, product(x.T, f.T)), np.cumsum(sizes)[:-1])
    parts = [each @ own for each, own in zip(hot, effects, strict=True)]
    squares = [(part**2).sum(axis=0) for part in parts]
    left = ((f.T - sum(parts)) ** 2).sum(axis=0)
    within = left / (n - 1 - sum(sizes) + len(sizes))
    total = np.maximum(sum(squares) + left + n * noise, 1e-12)
    return [
        np.clip((square - (k - 1) * within) / total, 0.0, 1.0)
        for square, k in zip(squares, sizes, strict=True)
    ]


def log_draws(model: Model, columns: Array, count: int) -> tuple[Array, Array]:
    """Return draws of the log of the usage, shape ``(count, n_points)``, and of its noise."""
    if isinstance(model, ChainedModel):
        base, its = _draws(model.base, columns, count, 0)
        ratio, own = _draws(model.ratio, columns, count, 1)
        return base + ratio, its + own
    return _draws(model, columns, count, 0)


def _draws(model: ResourceModel, columns: Array, count: int, seed: int) -> tuple[Array, Array]:
    mean, covariance = model.joint(columns)
    normal = np.random.default_rng(seed).standard_normal((count, len(mean)))
    away = product(normal, square_root(covariance).T)
    logs = model.location + model.scale * (mean + away)
    power = np.exp(np.minimum(logs, 300.0))
    amounts = np.maximum(model.floor + power, 1e-300)
    # What is above the floor scatters: its share of the usage is the slope of the logarithm.
    share = np.minimum(power / amounts, 1.0)
    noise = model.scale**2 * model.process.noise * (share**2).mean(axis=1)
    return np.log(amounts), noise
