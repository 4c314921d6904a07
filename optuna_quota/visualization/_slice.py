"""Use against each hyperparameter, with what the model expects."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._records import Interval
from optuna_quota.visualization import _style
from optuna_quota.visualization._chart import Axis
from optuna_quota.visualization._chart import Band
from optuna_quota.visualization._chart import Chart
from optuna_quota.visualization._chart import Level
from optuna_quota.visualization._chart import Line
from optuna_quota.visualization._chart import Mark
from optuna_quota.visualization._chart import Panel
from optuna_quota.visualization._chart import Points
from optuna_quota.visualization._draw import figure_of
from optuna_quota.visualization._predict import predict
from optuna_quota.visualization._rows import hover_of
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._rows import rows_of
from optuna_quota.visualization._ticks import ends
from optuna_quota.visualization._usage import limit_level


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._footprint.footprint import Footprint


_STEPS = 25


class _Place(NamedTuple):
    number: int
    outcome: str
    x: Any
    amount: float
    hover: str


class _Slice(NamedTuple):
    param: str
    log: bool
    categories: tuple[str, ...]
    places: list[_Place]
    expected: list[tuple[Any, Interval]]


class _SliceInfo(NamedTuple):
    resource: str
    limit: float | None
    slices: list[_Slice]


def plot_usage_slice(
    study: Study,
    *,
    resource: str = "memory",
    params: Sequence[str] | None = None,
    footprint: Footprint | None = None,
) -> go.Figure:
    """Plot usage against each hyperparameter, with what a model expects and its 90% band.

    The line varies one hyperparameter and holds the others at their median or most frequent
    value over the trials that ran.

    Example:

        .. code-block:: python

            from optuna_quota import analyze
            from optuna_quota.visualization import plot_usage_slice

            plot_usage_slice(study, params=["width"], footprint=analyze(study).footprint).show()

    Args:
        study: The study.
        resource: What to show.
        params: Hyperparameters, in the order of the panels; all that varied unless given.
        footprint: A fitted :class:`~optuna_quota.Footprint`; without it, points only.

    Raises:
        ValueError: If a name among ``params`` is that of no hyperparameter of a finished trial.
        ImportError: If plotly is not installed.
    """
    return figure_of(_slice_chart(_get_slice_info(study, resource, params, footprint)))


def _get_slice_info(
    study: Study,
    resource: str,
    params: Sequence[str] | None = None,
    footprint: Footprint | None = None,
    rows: Sequence[Row] | None = None,
) -> _SliceInfo:
    found = rows_of(study) if rows is None else rows
    used = [r for r in found if resource in r.amounts and r.outcome != "rejected"]
    space = _space(found)
    _check(params, space)
    names = list(params) if params is not None else _varied(used, space)
    typical = _typical(used, space)
    slices = [_slice(name, used, space[name], resource, typical, footprint) for name in names]
    return _SliceInfo(resource, limits_of(study).get(resource), slices)


def _space(rows: Sequence[Row]) -> dict[str, BaseDistribution]:
    return {name: d for row in rows for name, d in row.distributions.items()}


def _check(params: Sequence[str] | None, space: Mapping[str, BaseDistribution]) -> None:
    for name in params or ():
        if name not in space:
            raise ValueError(
                f"`params` must name hyperparameters of finished trials but got {name!r}; "
                f"known are {', '.join(sorted(space)) or 'none'}."
            )


def _varied(rows: Sequence[Row], space: Mapping[str, BaseDistribution]) -> list[str]:
    seen = {name: {_key(row.params[name]) for row in rows if name in row.params} for name in space}
    return [name for name in space if len(seen[name]) > 1]


def _key(value: Any) -> str:
    return f"{type(value).__name__}:{value!r}"


def _slice(
    name: str,
    rows: Sequence[Row],
    distribution: BaseDistribution,
    resource: str,
    typical: Mapping[str, Any],
    footprint: Footprint | None,
) -> _Slice:
    having = [row for row in rows if name in row.params]
    choices = getattr(distribution, "choices", None)
    numeric = choices is None
    places = [
        _Place(
            row.number,
            row.outcome,
            row.params[name] if numeric else str(row.params[name]),
            row.amounts[resource],
            hover_of(row, resource),
        )
        for row in having
    ]
    grid = list(choices) if choices is not None else _grid([p.x for p in places], distribution)
    expected = [] if footprint is None else _expected(name, grid, typical, resource, footprint)
    shown = [(x if numeric else str(x), interval) for x, interval in expected]
    log = bool(getattr(distribution, "log", False))
    categories = tuple(dict.fromkeys(str(c) for c in choices)) if choices is not None else ()
    return _Slice(name, log, categories, places, shown)


def _grid(values: Sequence[float], distribution: BaseDistribution) -> list[float]:
    if not values:
        return []
    low, high = min(values), max(values)
    if getattr(distribution, "log", False):
        grid = [low * (high / low) ** (i / (_STEPS - 1)) for i in range(_STEPS)]
    else:
        grid = [low + (high - low) * i / (_STEPS - 1) for i in range(_STEPS)]
    whole = all(float(v).is_integer() for v in values)
    return list(dict.fromkeys(round(v) for v in grid)) if whole else grid


def _expected(
    name: str, grid: Sequence[Any], typical: Mapping[str, Any], resource: str, footprint: Footprint
) -> list[tuple[Any, Interval]]:
    found = ((x, predict(footprint, {**typical, name: x}, resource)) for x in grid)
    return [(x, interval) for x, interval in found if interval is not None]


def _typical(rows: Sequence[Row], space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    # Parameters that fewer than half of the trials have are those of a branch: left out.
    typical = {}
    for name, distribution in space.items():
        values = [row.params[name] for row in rows if name in row.params]
        if values and 2 * len(values) >= len(rows):
            typical[name] = _middle(values, distribution)
    return typical


def _middle(values: list[Any], distribution: BaseDistribution) -> Any:
    if getattr(distribution, "choices", None) is None:
        return sorted(values)[len(values) // 2]
    keys = [_key(v) for v in values]
    return values[max(range(len(values)), key=lambda i: keys.count(keys[i]))]


def _slice_chart(info: _SliceInfo) -> Chart:
    title = f"{_style.title_of(info.resource)} by hyperparameter"
    slices = [s for s in info.slices if s.places]
    if not slices:
        return Chart(title, f"No hyperparameter varied over trials with known {info.resource}.")
    amounts = [p.amount for s in slices for p in s.places]
    levels = [info.limit] if info.limit is not None else []
    unit = _style.unit_for(info.resource, amounts)
    log = _style.spreads(amounts)
    low, high = ends(amounts, log=log, levels=levels)
    y = Axis("", log=log, low=unit.of(low), high=unit.of(high))
    panels = tuple(
        Panel(
            _x_axis(s),
            Axis(
                unit.axis(_style.title_of(info.resource)) if i % 4 == 0 else "",
                y.log,
                (),
                y.low,
                y.high,
            ),
            _marks(s, unit),
            tuple(_level(info, v, unit, labelled=i == 0) for v in levels),
        )
        for i, s in enumerate(slices)
    )
    return Chart(title, _how_to_read(slices), panels)


def _level(info: _SliceInfo, limit: float, unit: _style.Unit, *, labelled: bool) -> Level:
    level = limit_level(info.resource, limit, unit)
    return level if labelled else replace(level, label="")


def _x_axis(found: _Slice) -> Axis:
    if found.categories:
        return Axis(found.param, categories=found.categories)
    numbers = [float(p.x) for p in found.places]
    low, high = min(numbers), max(numbers)
    if found.log and low > 0:
        pad = max(1.05, (high / low) ** 0.04)
        return Axis(found.param, log=True, low=low / pad, high=high * pad)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(found.param, low=low - pad, high=high + pad)


def _marks(found: _Slice, unit: _style.Unit) -> tuple[Mark, ...]:
    groups = {o: [p for p in found.places if p.outcome == o] for o in _style.OUTCOME_COLORS}
    points: list[Mark] = [
        Points(
            outcome,
            _style.OUTCOME_COLORS[outcome],
            _style.OUTCOME_SYMBOLS[outcome],
            [p.x for p in places],
            [unit.of(p.amount) for p in places],
            [p.hover for p in places],
        )
        for outcome, places in groups.items()
        if places
    ]
    band, model = _model_marks(found, unit)
    # The line stands above the points: among thousands it would be hidden.
    return (*band, *points, *model)


def _model_marks(found: _Slice, unit: _style.Unit) -> tuple[list[Mark], list[Mark]]:
    if not found.expected:
        return [], []
    x = [_style.significant(x) if isinstance(x, float) else x for x, _ in found.expected]
    medians = [unit.of(i.median) for _, i in found.expected]
    lows = [unit.of(i.lower) for _, i in found.expected]
    highs = [unit.of(i.upper) for _, i in found.expected]
    if found.categories:
        return [], [Points("model", _style.GREEN, "diamond", x, medians, (), lows, highs)]
    band = Band("model, 90%", _style.GREEN, x, lows, highs)
    return [band], [Line("model", _style.GREEN, x, medians)]


def _how_to_read(slices: Sequence[_Slice]) -> str:
    if any(s.expected for s in slices):
        return "model: the other hyperparameters at their median or most frequent value"
    count = max(len(s.places) for s in slices)
    return f"{count:,} trials" if count != 1 else "1 trial"


def spread_explained(info: _Slice) -> float:
    """Return the share of the variance of log usage that lies between groups, from 0 to 1.

    It ranks panels where no correlations are at hand. The groups are quarters of a number's range
    of ranks, or the categories (the correlation ratio η²).
    """
    if len(info.places) < 3:
        return 0.0
    logs = [math.log(p.amount) if p.amount > 0 else 0.0 for p in info.places]
    groups: dict[Any, list[float]] = {}
    if info.categories:
        for place, value in zip(info.places, logs, strict=True):
            groups.setdefault(place.x, []).append(value)
    else:
        order = sorted(range(len(logs)), key=lambda i: float(info.places[i].x))
        tiles = min(4, len(order))
        for rank, index in enumerate(order):
            groups.setdefault(rank * tiles // len(order), []).append(logs[index])
    mean = math.fsum(logs) / len(logs)
    total = math.fsum((v - mean) ** 2 for v in logs)
    between = math.fsum(len(g) * (math.fsum(g) / len(g) - mean) ** 2 for g in groups.values())
    return between / total if total > 0 else 0.0
