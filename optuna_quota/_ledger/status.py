"""``status``: what a study has used, reserved and left of its quota; the settings it stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
import logging
import time
from typing import Any, TYPE_CHECKING

from optuna.study import Study

from optuna_quota import _optuna
from optuna_quota._html import element, table
from optuna_quota._ledger.heartbeat import others_run
from optuna_quota._ledger.state import TrialRows
from optuna_quota._ledger.totals import QuotaTotals
from optuna_quota._limits import Limits, Quota, quota_from_amounts
from optuna_quota._metering.breach import quota_bound
from optuna_quota._records import (
    amounts_object,
    read_amounts,
    STUDY_LIMITS,
    STUDY_PRICES,
    STUDY_QUOTA,
)
from optuna_quota._resources import (
    format_amount,
    get_resource,
    HELD_RESOURCES,
    PRICED_RESOURCES,
    TOTAL_RESOURCES,
)
from optuna_quota._table import check_study, DataFrame, float_frame
from optuna_quota._units import align, counted, format_seconds


if TYPE_CHECKING:
    from optuna_quota._projection.projection import Projection

_logger = logging.getLogger("optuna.quota.sampler")


@dataclass(frozen=True)
class LedgerLine:
    """One resource; amounts in SI base units."""

    resource: str
    used: float  # Usage of finished trials; 0 for what is held at one moment
    reserved: float  # What running trials hold or ask for; on the fullest host if it is per host
    quota: float | None  # The quota; None without one
    # Number of finished trials of unknown usage; each counts with its limit, or else with the
    # largest known usage.
    unknown: int = 0

    @property
    def left(self) -> float | None:
        """What is neither used nor reserved; None without a quota."""
        return None if self.quota is None else max(0.0, self.quota - self.used - self.reserved)

    @property
    def exceeded(self) -> bool:
        taken = self.reserved if self.resource in HELD_RESOURCES else self.used
        return self.quota is not None and taken > quota_bound(self.quota)


@dataclass(frozen=True)
class LedgerStatus:
    """What a study has used, reserved and left of its quota; ``print`` shows tables.

    Example:

        .. code-block:: python

            found = status(study)
            print(found)
            found.table.loc["cpu_time", "left"]

    Attributes:
        lines: One for each resource with a quota or known usage.
        by_worker: Usage of each worker's finished trials, by worker and resource.
        by_outcome: The same by outcome.
        running: Number of running trials, by worker.
        waiting: How many of those wait for others to release what they hold.
        end: When and why the quota will be used up; None if unknown.
    """

    lines: Sequence[LedgerLine]
    by_worker: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by_outcome: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0
    end: str | None = None

    @property
    def table(self) -> DataFrame:
        """A DataFrame indexed by resource: ``used``, ``reserved``, ``left``, ``quota``.

        In SI base units; ``left`` and ``quota`` are NaN where there is no quota.
        """
        rows = {line.resource: {**vars(line), "left": line.left} for line in self.lines}
        return float_frame(rows, ("used", "reserved", "left", "quota"))

    @property
    def exceeded(self) -> tuple[str, ...]:
        """The resources of which more than the quota is used, or held at this moment."""
        return tuple(line.resource for line in self.lines if line.exceeded)

    @property
    def workers(self) -> DataFrame:
        """A DataFrame indexed by worker: ``running`` trials and usage by resource."""
        groups = self._workers
        return float_frame(groups, ("running", *_columns(groups)))

    @property
    def outcomes(self) -> DataFrame:
        """A DataFrame indexed by outcome: usage by resource."""
        return float_frame(self.by_outcome, _columns(self.by_outcome))

    @property
    def _workers(self) -> dict[str, Mapping[str, float]]:
        names = sorted({*self.by_worker, *self.running})
        return {n: {"running": self.running.get(n, 0), **self.by_worker.get(n, {})} for n in names}

    def __str__(self) -> str:
        notes = "\n".join(self._notes())
        return "\n\n".join([*map(_text_table, self._tables()), *([notes] if notes else [])])

    def _repr_html_(self) -> str:
        tables = (table(t[0], t[1:], right=range(1, len(t[0]))) for t in self._tables())
        return element("div", *tables, *(element("p", note) for note in self._notes()))

    def _tables(self) -> list[list[tuple[str, ...]]]:
        tables = (
            self._resource_rows(),
            _group_rows("worker", self._workers, ("running", *_columns(self._workers))),
            _group_rows("outcome", self.by_outcome, _columns(self.by_outcome)),
        )
        return [rows for rows in map(list, tables) if len(rows) > 1]

    def _resource_rows(self) -> Iterator[tuple[str, ...]]:
        yield ("resource", "used", "reserved", "left", "quota", "")
        for line in self.lines:
            shown = (line.used, line.reserved or None, line.left, line.quota)
            share = f"{(line.used + line.reserved) / line.quota:.0%}" if line.quota else ""
            texts = (_text(line.resource, value) for value in shown)
            yield (get_resource(line.resource).title, *texts, share)

    def _notes(self) -> Iterator[str]:
        for line in self.lines:
            if line.unknown:
                title = get_resource(line.resource).title
                yield (
                    f"{title[:1].upper()}{title[1:]} of {counted(line.unknown, 'trial')} is "
                    "unknown: counted with the limit, or else with the largest known usage."
                )
        if self.waiting:
            wait = "trial waits" if self.waiting == 1 else "trials wait"
            yield f"{self.waiting} running {wait} for what others hold."
        if self.end is not None:
            yield self.end


def _columns(groups: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [name for name in TOTAL_RESOURCES if any(name in each for each in groups.values())]


def _group_rows(
    title: str, groups: Mapping[str, Mapping[str, float]], columns: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    yield (title, *(get_resource(name).title for name in columns))
    for group, amounts in sorted(groups.items()):
        if any(amounts.values()):
            yield (group, *(_text(name, amounts.get(name)) for name in columns))


def _text(resource: str, amount: float | None) -> str:
    return "–" if amount is None else format_amount(resource, amount)


def status(
    study: Study, *, quota: Quota | None = None, projection: Projection | None = None
) -> LedgerStatus:
    """Return what a study has used, reserved and left of its quota, over all workers.

    Example:

        .. code-block:: python

            print(status(study))
            status(study).table.loc["cpu_time", "left"]

    Args:
        study: The study; its workers' code is not needed.
        quota: The quota to compare with; by default the one in the study's attributes.
        projection: A :class:`~optuna_quota.Projection` of the study, to estimate when it ends;
            by default its pace so far.

    Raises:
        TypeError: If ``study`` is not an Optuna study, or ``quota`` is no Quota.
    """
    check_study(study)
    if quota is not None and not isinstance(quota, Quota):
        raise TypeError(f"`quota` must be a Quota but got {quota!r}.")
    attributes = _optuna.user_attrs_of(study)
    totals = QuotaTotals(
        quota or stored_quota(attributes), read_amounts(attributes.get(STUDY_LIMITS))
    )
    TrialRows(study).read_into(totals)
    lines = tuple(_lines(totals, time.time()))
    running = Counter(entry.worker for entry in totals.open if entry.state == "running")
    waiting = sum(1 for claim in totals.claims if claim.queued_for and not claim.granted)
    return LedgerStatus(
        lines,
        {name: dict(amounts) for name, amounts in totals.by_worker.items()},
        {name: dict(amounts) for name, amounts in totals.by_outcome.items()},
        dict(running),
        waiting,
        _projected_end(projection) if projection is not None else _end_at_this_pace(lines),
    )


def stored_quota(attributes: Mapping[str, Any]) -> Quota:
    """Return the quota in a study's attributes, without malformed entries."""
    stored = read_amounts(attributes.get(STUDY_QUOTA))
    known = {*TOTAL_RESOURCES, *HELD_RESOURCES}
    amounts: dict[str, Any] = {n: amount for n, amount in stored.items() if n in known}
    prices = read_amounts(attributes.get(STUDY_PRICES))
    prices = {name: price for name, price in prices.items() if name in PRICED_RESOURCES}
    if "cost" not in amounts or not prices:
        amounts.pop("cost", None)
        prices = {}
    if "n_trials" in amounts and not float(amounts["n_trials"]).is_integer():
        del amounts["n_trials"]
    return quota_from_amounts(amounts, prices)


def store_study_settings(study: Study, quota: Quota, limits: Limits, *, warn: bool) -> bool:
    """Store a worker's quota and limits as the study's, unless another worker uses others.

    Returns whether they are the study's now.
    """
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    stored = storage.get_study_user_attrs(study_id)
    own: dict[str, Mapping[str, float]] = {
        STUDY_QUOTA: amounts_object(quota),
        STUDY_LIMITS: amounts_object(limits),
    }
    if quota.prices or stored.get(STUDY_PRICES):
        own[STUDY_PRICES] = dict(quota.prices)
    differing = [key for key in own if stored.get(key) != own[key]]
    changes = [_change(key, stored[key], own[key]) for key in differing if key in stored]
    if changes and others_run(study):
        if warn:
            _logger.warning(
                f"Other workers of the study {study.study_name!r} run with another quota or other "
                f"limits. {'. '.join(changes)}, for this worker's trials only: the study keeps "
                "its own while other workers run. Give all workers the same."
            )
        return False
    for key in differing:
        storage.set_study_user_attr(study_id, key, own[key])
    if changes:
        _logger.info(f"{'. '.join(changes)}.")
    # Two workers that start at the same moment have both written.
    stored = storage.get_study_user_attrs(study_id) if differing else own
    return all(stored.get(key) == own[key] for key in own)


def _change(key: str, stored: Any, own: Mapping[str, float]) -> str:
    """Return what differs, such as ``"Quota changed from 2 h to 4 h (wall time)"``."""
    other = stored if isinstance(stored, Mapping) else {}
    names = [n for n in dict.fromkeys([*other, *own]) if other.get(n) != own.get(n)]
    parts = [
        f"from {_shown(key, n, other.get(n))} to {_shown(key, n, own.get(n))} "
        f"({get_resource(str(n)).title})"
        for n in names
    ]
    title = {STUDY_QUOTA: "Quota", STUDY_LIMITS: "Limits"}.get(key, "Prices")
    return f"{title} changed {', '.join(parts) or 'from what could not be read'}"


def _shown(key: str, name: Any, value: Any) -> str:
    if value is None:
        return "none"
    is_amount = key != STUDY_PRICES and isinstance(value, (int, float))
    return format_amount(str(name), value) if is_amount else str(value)


def _lines(totals: QuotaTotals, now: float) -> Iterator[LedgerLine]:
    quota, used, reserved = totals.quota.amounts(), totals.used(now), totals.reserved()
    for name in TOTAL_RESOURCES:
        if name in quota or used.get(name) or name == "n_trials":
            yield LedgerLine(
                name,
                used.get(name, 0.0),
                reserved.get(name, 0.0),
                quota.get(name),
                totals.unknown[name] if name in quota else 0,
            )
    machines = {claim.machine for claim in totals.claims}
    for name in HELD_RESOURCES:
        if name in quota:
            fullest = max((totals.reserved(m).get(name, 0.0) for m in machines), default=0.0)
            yield LedgerLine(name, 0.0, fullest, quota[name])


def _end_at_this_pace(lines: Sequence[LedgerLine]) -> str | None:
    used = {line.resource: line.used for line in lines}
    seconds = used.get("wall_time", 0.0)
    ends = [
        (seconds * (line.quota - line.used) / line.used, line.resource)
        for line in lines
        if line.quota is not None and line.used > 0 and line.resource not in HELD_RESOURCES
    ]
    if not ends or seconds <= 0:
        return None
    first, resource = min(ends)
    title = get_resource(resource).title
    if first <= 0:
        return f"The quota of {title} is used up."
    when = format_seconds(first)
    return f"At the current pace, the quota of {title} will be used up in {when} of running time."


def _projected_end(projection: Projection) -> str | None:
    row = next((row for row in projection.resources if row.resource == "wall_time"), None)
    if row is None:
        return None
    median, upper = (max(0.0, amount - row.used) for amount in (row.median, row.upper))
    return (
        f"Projected end: in {format_seconds(median)} of running time, "
        f"at most {format_seconds(upper)}."
    )


def _text_table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *lines = align(rows)
    return "\n".join([head, "─" * max(map(len, (head, *lines))), *lines])
