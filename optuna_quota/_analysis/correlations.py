"""Rank correlations and effect sizes of hyperparameters and usage.

Numbers have Spearman's ρ with the interval of Bonett and Wright (Psychometrika 65, 2000):
``tanh(atanh(ρ) ± z · sqrt((1 + ρ²/2) / (n − 3)))``. Categories have the Kruskal-Wallis test and
its effect size ε² = H / (n − 1) (Tomczak and Tomczak, Trends in Sport Sciences 21, 2014), with
the interval from inverting the noncentral χ² distribution of H. All p-values of a study are
adjusted together by Holm's method, which bounds the probability of any false claim under any
dependence.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_quota._table import DataFrame
from optuna_quota._utilization.data import Parameter, StudyData
from optuna_quota._utilization.model import holm


_FIGURES = ("rho", "lower", "upper", "p_value")
_COLUMNS = ("param", "resource", *_FIGURES, "p_adjusted", "n", "measure", "branch")
# Fewer trials are not tested: at n = 8 only |rho| > 0.74 passes a single test at 5%.
MIN_TRIALS = 8
_Z95 = 1.959963984540054


def correlations(data: StudyData) -> DataFrame:
    """Return a row for every parameter and resource, the strongest of each resource first.

    Figures are NaN where fewer than eight trials are known or the parameter or usage never varied;
    ``n`` is given all the same. A conditional parameter is tested among the trials that have it,
    which ``branch`` names.
    """
    import pandas as pd

    rows = [_row(data, p, r) for r in data.resources for p in data.parameters]
    table: DataFrame = pd.DataFrame(rows, columns=list(_COLUMNS))
    table["p_adjusted"] = holm(table["p_value"].to_numpy(dtype=float))
    order = table["rho"].abs().fillna(-1.0)
    place = table["resource"].map({name: i for i, name in enumerate(data.resources)})
    index = np.lexsort((-order.to_numpy(dtype=float), place.to_numpy(dtype=float)))
    ordered: DataFrame = table.iloc[index].reset_index(drop=True)
    return ordered


def _row(data: StudyData, parameter: Parameter, resource: str) -> dict[str, Any]:
    kept = data.ranked(resource) & parameter.active
    x, y = parameter.values[kept], data.amounts(resource)[kept]
    figures = dict.fromkeys(_FIGURES, math.nan)
    if len(x) >= MIN_TRIALS and (x != x[0]).any() and (y != y[0]).any():
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
