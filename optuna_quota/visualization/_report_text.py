"""The texts and tables of a report, apart from their markup in HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._ledger import status
from optuna_quota._resources import format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import by_outcome, FinishedTrial, limits_of, ReportData
from optuna_quota.visualization._waste import _get_waste_info, total_of, waste_finding


if TYPE_CHECKING:
    from optuna_quota._analysis.advice import Advice
    from optuna_quota._analysis.cost_drivers import Driver
    from optuna_quota._ledger.status import LedgerLine


LEDGER = ("used", "reserved", "left", "quota")
# Outcomes of trials that are listed with their reasons.
ENDED = ("terminated", "rejected", "preempted", "failed")
DRIVERS = (
    "Share of the variance of the logarithm of the usage over the range searched (the rest is "
    "noise and interactions), and what becomes of the usage where the hyperparameter alone is "
    "doubled or halved at the best trial; 90% intervals, by the footprint."
)


class LedgerRow(NamedTuple):
    """One resource of the ledger, formatted; ``share`` is used and reserved over the quota."""

    cells: Sequence[str]
    share: float | None


class DriverRow(NamedTuple):
    """One hyperparameter that drives a resource, formatted; ``share`` is its median share."""

    title: str
    param: str
    share: float
    interval: str
    change: str


class ModelRow(NamedTuple):
    """One fitted model: its resource, formula and warnings."""

    title: str
    formula: str
    warnings: Sequence[str]


class EndedRow(NamedTuple):
    """One trial that was terminated or rejected, or that failed, formatted."""

    number: int
    outcome: str
    reason: str
    used: str


@dataclass(frozen=True)
class ReportText:
    """The texts of a report.

    Attributes:
        name: The study's name.
        headline: Short sentences, the most important first.
        tiles: Pairs of a figure and its meaning.
        ledger_head: Titles of the ledger's columns.
        ledger: The ledger by resource.
        limits: Limits on a trial: pairs of resource and amount.
        end: When the quota will be used up, None where that is unknown.
        drivers: What drives each resource, where that is clear.
        models: The fitted models.
        cheaper: Bounds that would halve the cost, a sentence; None where none would.
        advice: What else to change.
        ended: Trials that were terminated or rejected, or that failed, the latest first.
    """

    name: str
    headline: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    ledger_head: Sequence[str]
    ledger: Sequence[LedgerRow]
    limits: Sequence[tuple[str, str]]
    end: str | None
    drivers: Sequence[DriverRow]
    models: Sequence[ModelRow]
    cheaper: str | None
    advice: Sequence[Advice]
    ended: Sequence[EndedRow]


def report_text(data: ReportData) -> ReportText:
    """Return the texts of a study's report."""
    ledger, analysis = status(data.study), data.analysis
    # A column of dashes says nothing.
    shown = [c for c in LEDGER if c != "reserved" or any(line.reserved for line in ledger.lines)]
    formulas = {} if analysis is None else analysis.formulas
    drivers = {} if analysis is None else analysis.drivers
    return ReportText(
        name=data.study.study_name,
        headline=_headline(data),
        tiles=_tiles(data),
        ledger_head=["resource", *shown, "of the quota"],
        ledger=[_ledger_row(line, shown) for line in ledger.lines],
        limits=[
            (get_resource(name).title, format_amount(name, v))
            for name, v in limits_of(data.study).items()
        ],
        end=ledger.end,
        drivers=[_driver_row(name, d) for name, ds in drivers.items() for d in ds if d.is_clear],
        models=[
            ModelRow(_theme.resource_title(name), formula, analysis.model_warnings(name))
            for name, formula in formulas.items()
            if analysis is not None
        ],
        cheaper=str(analysis.cheaper_space) if analysis and analysis.cheaper_space else None,
        advice=[] if analysis is None else analysis.advice,
        ended=[_ended_row(trial) for trial in reversed(data.trials) if trial.outcome in ENDED],
    )


def _headline(data: ReportData) -> list[str]:
    if not data.trials:
        return ["No trial has finished yet."]
    counts = {o: len(group) for o, group in by_outcome(data.trials).items()}
    total = f"{len(data.trials):,} trial{'s' if len(data.trials) != 1 else ''}"
    ended = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    sentences = [f"{total} finished: {ended}."]
    best = _best(data)
    if best is not None:
        value = best.trial.values[0]
        sentences.append(f"The best value, {value:.5g}, is that of trial {best.number}.")
    waste = _get_waste_info(data.study, data.trials)
    if waste.spent:
        sentences.append(f"{waste_finding(waste)}.")
    return sentences


def _best(data: ReportData) -> FinishedTrial | None:
    """Return the best completed trial of a study with one objective."""
    if len(data.study.directions) != 1:
        return None
    done = [
        trial
        for trial in data.trials
        if trial.outcome == "completed"
        and trial.trial.values
        and math.isfinite(trial.trial.values[0])
    ]
    sign = -1.0 if data.study.directions[0].name == "MAXIMIZE" else 1.0
    return min(done, key=lambda t: (sign * t.trial.values[0], t.number), default=None)


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    tiles = [(f"{len(data.trials):,}", "trials finished")]
    best = _best(data)
    if best is not None:
        tiles.append((f"{best.trial.values[0]:.4g}", f"best value, trial {best.number}"))
    memory = [trial.amounts["memory"] for trial in data.trials if "memory" in trial.amounts]
    if memory:
        tiles.append((format_amount("memory", max(memory)), "peak memory of a trial"))
    waste = _get_waste_info(data.study, data.trials)
    if waste.spent:
        resource, spent = next(iter(waste.spent.items()))
        total = format_amount(resource, sum(spent.values()))
        share = f"{100 * waste.share(resource, 'terminated'):.0f}%"
        tiles += [(total, get_resource(total_of(resource)).title)]
        tiles += [(share, "of it on terminated trials")]
    return tiles


def _ledger_row(line: LedgerLine, columns: Sequence[str]) -> LedgerRow:
    amounts = (getattr(line, name) for name in columns)
    cells = [format_amount(line.resource, amount) if amount else "–" for amount in amounts]
    share = (line.used + line.reserved) / line.quota if line.quota else None
    return LedgerRow([_theme.resource_title(line.resource), *cells], share)


def _driver_row(resource: str, driver: Driver) -> DriverRow:
    lower, share, upper = driver.share
    interval = f"{100 * share:.0f}% ({100 * lower:.0f} to {100 * upper:.0f}%)"
    change = ""
    if driver.clear_factor is not None:
        lower, factor, upper = driver.clear_factor
        change = "doubled" if driver.change > 1 else "halved"
        change += f": × {factor:.2f} ({lower:.2f} to {upper:.2f})"
    return DriverRow(_theme.resource_title(resource), driver.param, share, interval, change)


def _ended_row(trial: FinishedTrial) -> EndedRow:
    breached = trial.record.censored_by or "memory"
    names = dict.fromkeys(("memory", "wall_time", "gpu_memory", breached))
    used = [
        f"{get_resource(name).title} {trial.format_usage(name)}"
        for name in names
        if name in trial.amounts
    ]
    reason = trial.record.reason or "No reason was recorded."
    return EndedRow(trial.number, trial.outcome, reason, ", ".join(used))
