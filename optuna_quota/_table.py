"""The trial table as a pandas DataFrame, one row a trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TYPE_CHECKING, TypeAlias

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _records
from optuna_quota._resources import USAGE_RESOURCES


if TYPE_CHECKING:
    import pandas as pd


# Here alone, as pandas is imported with the first table.
DataFrame: TypeAlias = "pd.DataFrame"
_TEXTS = ("outcome", "reason", "isolation", "host", "gpu_source", "censored_by")
_BREACH = ("breach_limit", "breach_observed", "breach_seconds")
_ALWAYS_PROJECTED = ("memory", "wall_time", "cpu_time")


def trial_table(study: Study) -> DataFrame:
    """Return the trial table of a study, one row a trial, in SI base units.

    Example:

        .. code-block:: python

            table = trial_table(study)
            table[table.outcome == "terminated"][["number", "memory", "reason"]]

    The columns are ``number``, ``state``, ``value`` (``values_0``, ``values_1``, … in a
    multi-objective study), ``params_*``, the usage (``memory`` and ``gpu_memory`` in bytes,
    ``wall_time``, ``cpu_time`` and ``gpu_time`` in seconds, ``energy`` in joules, and one for each
    meter of the user's own), ``outcome``, ``reason``, ``isolation``, ``host``, ``gpu_source``
    (where GPU usage comes from: ``process``, ``device`` or ``framework``), ``censored_by``,
    ``breach_limit``, ``breach_observed``, ``breach_seconds``, and for memory, wall time, CPU time
    and each other resource that was projected ``footprint_memory`` (the median),
    ``footprint_memory_lower`` and ``footprint_memory_upper``.

    An unknown number is NaN, an unknown text None. ``censored_by`` is the resource whose breach
    ended the trial: its usage is then a lower bound, and where it is a total (a time, energy), all
    totals are. Other usage of a trial that was stopped is what it had used by then: a part
    of unknown size, but for peaks, which are mostly reached early, of pruned trials and of those
    that a total ended. A finished trial whose wall time was not measured (a study that ran without
    this library) has the time between Optuna's ``datetime_start`` and ``datetime_complete``; its
    ``outcome`` stays None.

    Args:
        study: Any Optuna study; needs no attributes of this library.

    Raises:
        TypeError: If ``study`` is not an Optuna study.
    """
    check_study(study)
    trials = study.get_trials(deepcopy=False)
    return table_of(trials, [_records.read_record(t) for t in trials], len(study.directions))


def check_study(study: Any) -> None:
    if not isinstance(study, Study):
        raise TypeError(f"`study` must be an Optuna study but got {study!r}.")


def table_of(
    trials: Sequence[FrozenTrial], records: Sequence[_records.TrialRecord], n_objectives: int
) -> DataFrame:
    """Return the table of the trials given with their records; see :func:`trial_table`."""
    import pandas as pd

    columns: dict[str, Any] = {
        "number": _series((t.number for t in trials), "int64"),
        "state": _series((t.state.name for t in trials), "object"),
        **_value_columns(trials, n_objectives),
        **_param_columns(trials),
    }
    usages = [measured_usage(t, r) for t, r in zip(trials, records, strict=True)]
    for name in USAGE_RESOURCES:
        columns[name] = _series(usage.get(name) for usage in usages)
    for name in _TEXTS:
        columns[name] = _series((getattr(r, name) for r in records), "object")
    for name in _BREACH:
        field = name.removeprefix("breach_")
        columns[name] = _series(getattr(r.breach, field, None) for r in records)
    columns.update(_footprint_columns(records))
    for name in _names(usages):
        columns.setdefault(name, _series(usage.get(name) for usage in usages))
    table: DataFrame = pd.DataFrame(columns)
    return table


def float_frame(
    rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], *, index: str | None = None
) -> DataFrame:
    """Return numbers by row and column as a DataFrame; what a row lacks is NaN."""
    import pandas as pd

    figures = [[row.get(name) for name in columns] for row in rows.values()]
    names = pd.Index(list(rows), name=index, dtype="object")
    table: DataFrame = pd.DataFrame(figures, index=names, columns=list(columns), dtype=float)
    return table


def measured_usage(trial: FrozenTrial, record: _records.TrialRecord) -> dict[str, float]:
    """Return what a trial used, by resource; wall time from Optuna's where it was not measured."""
    amounts, seconds = record.usage.amounts(), optuna_duration(trial)
    if seconds is not None and record.outcome != "rejected":
        amounts.setdefault("wall_time", seconds)
    return amounts


def usage_at_least(trial: FrozenTrial, record: _records.TrialRecord) -> dict[str, float]:
    """Return what a trial used, raised to the limit if it was stopped on its way there.

    A trial that was stopped by a forecast or a refused allocation would otherwise have used at
    least the limit. Unknown usage, and that of completed trials, is not raised.
    """
    amounts, breach = measured_usage(trial, record), record.breach
    if breach is not None and record.censored_by in amounts:
        amounts[breach.resource] = max(amounts[breach.resource], breach.limit)
    return amounts


def optuna_duration(trial: FrozenTrial) -> float | None:
    """Return the seconds between Optuna's datetimes, None where they measure nothing.

    A row made by hand (``create_trial``) starts and completes at one moment, and a clock may have
    been set back in between.
    """
    seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
    return seconds if seconds > 0 else None


def _value_columns(trials: Sequence[FrozenTrial], n_objectives: int) -> dict[str, Any]:
    values = [t.values or [] for t in trials]
    names = ["value"] if n_objectives == 1 else [f"values_{i}" for i in range(n_objectives)]
    return {
        name: _series(v[i] if i < len(v) else None for v in values) for i, name in enumerate(names)
    }


def _param_columns(trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    params = [t.params for t in trials]
    return {f"params_{name}": _params([p.get(name) for p in params]) for name in _names(params)}


def _footprint_columns(records: Sequence[_records.TrialRecord]) -> dict[str, Any]:
    columns = {}
    for name in dict.fromkeys([*_ALWAYS_PROJECTED, *_names([r.footprint for r in records])]):
        found = [r.footprint.get(name) for r in records]
        for end, suffix in {"median": "", "lower": "_lower", "upper": "_upper"}.items():
            columns[f"footprint_{name}{suffix}"] = _series(getattr(f, end, None) for f in found)
    return columns


def _names(mappings: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _params(values: list[Any]) -> Any:
    kinds = {type(v) for v in values}
    if kinds == {int} and max(values) < 2**63 and min(values) >= -(2**63):
        return _series(values, "int64")
    is_number = kinds <= {int, float, type(None)} and kinds != {int}
    return _series(values, "float64" if is_number else "object")


def _series(values: Iterable[Any], dtype: Any = "float64") -> Any:
    import pandas as pd

    return pd.Series(list(values), dtype=dtype)
