"""The texts and tables of a report, apart from their markup in HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.cost_drivers import Driver
from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._ledger.status import status
from optuna_quota._resources import format_amount, get_resource
from optuna_quota._units import counted
from optuna_quota.visualization._budget import TOTAL_OF, waste_finding, waste_of
from optuna_quota.visualization._data import by_outcome, ENDED, FinishedTrial, StudyTrials
from optuna_quota.visualization._theme import resource_title


LEDGER = ("used", "reserved", "left", "quota")
DRIVERS = (
    "Share of the variance of the logarithm of the usage over the range searched (the rest is "
    "noise and interactions), and what becomes of the usage where the hyperparameter alone is "
    "doubled or halved at the best trial; 90% intervals, by the footprint."
)


class LedgerRow(NamedTuple):
    """One resource of the ledger; ``share`` is used and reserved over the quota."""

    cells: Sequence[str]
    share: float | None


class ModelRow(NamedTuple):
    title: str
    formula: str  # or a sentence, where a power law is not what the resource follows
    warnings: list[str]

    @property
    def is_formula(self) -> bool:
        return " = " in self.formula


class DriverRow(NamedTuple):
    """One hyperparameter that drives a resource; ``share`` is its median share."""

    title: str
    param: str
    share: float
    interval: str
    change: str


class EndedRow(NamedTuple):
    """One trial that was terminated, rejected or preempted, or that failed."""

    number: int
    outcome: str
    reason: str
    used: str


class ReportText:
    """The texts of a report, formatted; the most important first."""

    def __init__(self, trials: StudyTrials, report: StudyAnalysis) -> None:
        self._trials, self._report = trials, report
        self._waste = waste_of(trials)
        ledger = status(trials.study)
        # Omit a column of dashes.
        reserved = any(line.reserved for line in ledger.lines)
        shown = [name for name in LEDGER if name != "reserved" or reserved]
        self.name = trials.study.study_name
        self.ledger_head = ["resource", *shown, "of the quota"]
        self.ledger = []
        for line in ledger.lines:
            # Zero is shown only for what is left.
            amounts = {name: getattr(line, name) for name in shown}
            known = {n: a for n, a in amounts.items() if a or (n == "left" and a is not None)}
            cells = [format_amount(line.resource, known[n]) if n in known else "–" for n in shown]
            share = (line.used + line.reserved) / line.quota if line.quota else None
            self.ledger.append(LedgerRow([resource_title(line.resource), *cells], share))
        limits = ", ".join(
            f"{get_resource(name).title} {format_amount(name, limit)}"
            for name, limit in trials.limits.items()
        )
        self.notes = [f"Limits on a trial: {limits}."] if limits else []
        if ledger.end:
            self.notes.append(ledger.end)

    @property
    def headline(self) -> str:
        """Outcomes of the trials, the best value and the waste."""
        trials = self._trials.finished
        if not trials:
            return "No trial has finished yet."
        ended = ", ".join(f"{len(group):,} {o}" for o, group in by_outcome(trials).items())
        sentences = [f"{counted(len(trials), 'trial')} finished: {ended}."]
        best = self._best()
        if best is not None:
            value = best.trial.values[0]
            sentences.append(f"The best value, {value:.5g}, is that of trial {best.number}.")
        if self._waste.spent:
            sentences.append(f"{waste_finding(self._waste)}.")
        return " ".join(sentences)

    def _best(self) -> FinishedTrial | None:
        """Return the best completed trial of a study with one objective."""
        best = set() if len(self._trials.study.directions) != 1 else set(self._report.best)
        return next((t for t in self._trials.finished if t.number in best), None)

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """Pairs of a figure and its meaning."""
        trials = self._trials.finished
        tiles = [(f"{len(trials):,}", "trials finished")]
        best = self._best()
        if best is not None:
            tiles.append((f"{best.trial.values[0]:.4g}", f"best value, trial {best.number}"))
        memory = [trial.amounts["memory"] for trial in trials if "memory" in trial.amounts]
        if memory:
            tiles.append((format_amount("memory", max(memory)), "peak memory of a trial"))
        if self._waste.spent:
            resource, spent = next(iter(self._waste.spent.items()))
            total = format_amount(resource, sum(spent.values()))
            share = self._waste.share(resource, "terminated")
            tiles.append((total, get_resource(TOTAL_OF[resource]).title))
            tiles.append((f"{share:.0%}", "of it on terminated trials"))
        return tiles

    @property
    def drivers(self) -> list[DriverRow]:
        """What drives each resource, where that is clear."""
        found = self._report.drivers.items()
        return [_driver_row(name, each) for name, all_ in found for each in all_ if each.is_clear]

    @property
    def models(self) -> list[ModelRow]:
        return [
            ModelRow(resource_title(name), formula, self._report.model_warnings(name))
            for name, formula in self._report.formulas.items()
        ]

    @property
    def advice(self) -> list[Advice]:
        """What to change: bounds that would halve the cost first."""
        cheaper = self._report.cheaper_space
        bounds = [] if cheaper is None else [Advice("search space", str(cheaper), {})]
        return [*bounds, *self._report.advice]

    @property
    def ended(self) -> list[EndedRow]:
        """Trials that ended without a value, the latest first."""
        return [_ended_row(t) for t in reversed(self._trials.finished) if t.outcome in ENDED]


def _driver_row(resource: str, driver: Driver) -> DriverRow:
    lower, share, upper = driver.share
    interval = f"{share:.0%} ({100 * lower:.0f} to {upper:.0%})"
    change = ""
    if driver.clear_factor is not None:
        lower, factor, upper = driver.clear_factor
        change = "doubled" if driver.change > 1 else "halved"
        change += f": × {factor:.2f} ({lower:.2f} to {upper:.2f})"
    return DriverRow(resource_title(resource), driver.param, share, interval, change)


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
