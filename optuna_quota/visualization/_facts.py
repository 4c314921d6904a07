"""What a report says in words and tables, before anyone writes it as HTML or Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_quota._ledger import status
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota.visualization import _style
from optuna_quota.visualization._charts import Material
from optuna_quota.visualization._rows import at_least
from optuna_quota.visualization._rows import by_outcome
from optuna_quota.visualization._rows import limits_of
from optuna_quota.visualization._rows import Row
from optuna_quota.visualization._waste import _get_waste_info
from optuna_quota.visualization._waste import waste_finding


if TYPE_CHECKING:
    from optuna_quota._ledger.status import LedgerLine


class LedgerRow(NamedTuple):
    """One resource of the ledger, as texts; ``share`` is what was used of the quota."""

    title: str
    used: str
    reserved: str
    left: str
    quota: str
    share: float | None


class ModelRow(NamedTuple):
    """One fitted model: a resource, its formula and what the diagnostics warn of."""

    title: str
    formula: str
    warnings: Sequence[str]


class AdviceRow(NamedTuple):
    """One piece of advice and lines to paste, by where."""

    text: str
    snippets: Mapping[str, str]


class EndedRow(NamedTuple):
    """One trial that was terminated or rejected, as texts."""

    number: int
    outcome: str
    reason: str
    used: str


@dataclass(frozen=True)
class Facts:
    """The report's words.

    Attributes:
        name: The study's name.
        headline: Short sentences, the most telling first.
        tiles: Pairs of a figure and what it is.
        ledger: The ledger by resource.
        limits: Limits on a trial: pairs of resource and amount.
        end: When the quota will be used up, None where that can't be told.
        models: The fitted models.
        advice: What to change.
        ended: Trials that were terminated or rejected, the latest first.
    """

    name: str
    headline: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    ledger: Sequence[LedgerRow]
    limits: Sequence[tuple[str, str]]
    end: str | None
    models: Sequence[ModelRow]
    advice: Sequence[AdviceRow]
    ended: Sequence[EndedRow]


def facts_of(material: Material, report: Any = None) -> Facts:
    """Return what is to be said about a study.

    Args:
        material: The study and its trials.
        report: A :class:`~optuna_quota.UtilizationReport`; without one there are no models and no
            advice.
    """
    ledger = status(material.study)
    ended = [r for r in material.rows if r.outcome in ("terminated", "rejected")]
    limits = limits_of(material.study)
    return Facts(
        material.study.study_name,
        _headline(material),
        _tiles(material),
        [_ledger_row(line) for line in ledger.lines],
        [(get_resource(name).title, format_amount(name, v)) for name, v in limits.items()],
        ledger.end,
        [] if report is None else _models(report.models),
        [] if report is None else [AdviceRow(str(a), dict(a.snippets)) for a in report.advice],
        [_ended(row) for row in reversed(ended)],
    )


def _headline(material: Material) -> list[str]:
    if not material.rows:
        return ["No trial has finished yet."]
    said = [outcomes_said(material.rows)]
    best = best_of(material)
    if best is not None:
        said.append(f"The best value, {best.trial.values[0]:.5g}, is that of trial {best.number}.")
    waste = _get_waste_info(material.study, material.rows)
    if waste.spent:
        said.append(f"They took {waste_finding(waste)}.")
    return said


def outcomes_said(rows: Sequence[Row]) -> str:
    """Return in a sentence how the trials ended."""
    groups = by_outcome(rows)
    counts = ", ".join(f"{len(group):,} {outcome}" for outcome, group in groups.items())
    return f"{len(rows):,} trial{'s' if len(rows) != 1 else ''} finished: {counts}."


def best_of(material: Material) -> Row | None:
    """Return the best completed trial of a study of one objective that is within its limits."""
    if len(material.study.directions) != 1:
        return None
    done = [
        row
        for row in material.rows
        if row.outcome == "completed" and row.trial.values and math.isfinite(row.trial.values[0])
    ]
    sign = -1.0 if material.study.directions[0].name == "MAXIMIZE" else 1.0
    return min(done, key=lambda r: (sign * r.trial.values[0], r.number), default=None)


def _tiles(material: Material) -> list[tuple[str, str]]:
    rows = material.rows
    tiles = [(f"{len(rows):,}", "trials finished")]
    best = best_of(material)
    if best is not None:
        tiles.append((f"{best.trial.values[0]:.4g}", f"best value, trial {best.number}"))
    memory = [row.amounts["memory"] for row in rows if "memory" in row.amounts]
    if memory:
        tiles.append((format_amount("memory", max(memory)), "most memory of a trial"))
    waste = _get_waste_info(material.study, rows)
    if waste.spent:
        resource = next(iter(waste.spent))
        tiles.append((format_amount(resource, sum(waste.spent[resource].values())), "trial time"))
        share = waste.share(resource, "terminated")
        tiles.append((f"{100 * share:.0f}%", "of it on terminated trials"))
    return tiles


def _ledger_row(line: LedgerLine) -> LedgerRow:
    shown = (line.used, line.reserved, line.left, line.quota)
    used, reserved, left, quota = (format_amount(line.resource, v) if v else "–" for v in shown)
    share = (line.used + line.reserved) / line.quota if line.quota else None
    return LedgerRow(_style.title_of(line.resource), used, reserved, left, quota, share)


def _models(models: Mapping[str, Any]) -> list[ModelRow]:
    return [
        ModelRow(_style.title_of(name), str(model.formula), [str(w) for w in model.diagnostics])
        for name, model in models.items()
    ]


def _ended(row: Row) -> EndedRow:
    shown = [
        f"{_style.title_of(name)} {at_least(row, name)}{format_amount(name, row.amounts[name])}"
        for name in ("memory", "wall_time", "gpu_memory")
        if name in row.amounts
    ]
    reason = row.record.reason or "No reason was recorded."
    return EndedRow(row.number, row.outcome, reason, ", ".join(shown))
