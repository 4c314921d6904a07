"""The texts of a report: for a terminal, at most 100 columns wide, and apart from their markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
import math
from typing import Any, NamedTuple

import numpy as np
from optuna.trial import FrozenTrial

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.drivers import claims, Driver, MIN_TESTED
from optuna_quota._analysis.study_analysis import follows_law, StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import by_outcome, ENDED, FinishedTrial
from optuna_quota._ledger.status import LedgerStatus, status
from optuna_quota._records import PROPOSED, read_record
from optuna_quota._resources import format_amount, get_resource
from optuna_quota._table import DataFrame
from optuna_quota._units import counted, LINE_WIDTH, wrap
from optuna_quota._utilization.model import UtilizationModel
from optuna_quota.visualization._cost import TOTAL_OF, waste_finding, waste_of
from optuna_quota.visualization._theme import resource_title


LEDGER = ("used", "reserved", "left", "quota")
DRIVERS = (
    "Share of the variance of the logarithm of the usage over the range searched (the rest is "
    "noise and interactions), and what becomes of the usage where the hyperparameter alone is "
    "doubled or halved at the best trial; 90% intervals, by the footprint."
)
# Fewer audits give no meaningful share.
_MIN_AUDITED = 4
_MAX_FRONT = 8


class LedgerRow(NamedTuple):
    """One resource of the ledger; ``share`` is used and reserved over the quota."""

    cells: Sequence[str]
    share: float | None


class DriverRow(NamedTuple):
    """One hyperparameter that drives a resource."""

    resource: str
    driver: Driver

    @property
    def title(self) -> str:
        return resource_title(self.resource)

    @property
    def share(self) -> str:
        lower, share, upper = self.driver.share
        return f"{share:.0%} ({100 * lower:.0f} to {upper:.0%})"

    @property
    def change(self) -> str:
        if self.driver.clear_factor is None:
            return ""
        lower, factor, upper = self.driver.clear_factor
        changed = "doubled" if self.driver.change > 1 else "halved"
        return f"{changed}: × {factor:.2f} ({lower:.2f} to {upper:.2f})"


class ReportText:
    """The texts of a report, formatted; the most important first."""

    def __init__(self, report: StudyAnalysis) -> None:
        self.report = report
        self.trials = trials_of(report)
        self.name = report.study.study_name
        self.finished = self.trials.finished
        self.waste = waste_of(self.trials)

    @cached_property
    def _status(self) -> LedgerStatus:
        return status(self.trials.study)

    @property
    def ledger_head(self) -> list[str]:
        # Omit a column of dashes.
        reserved = any(line.reserved for line in self._status.lines)
        shown = [name for name in LEDGER if name != "reserved" or reserved]
        return ["resource", *shown, "of the quota"]

    @cached_property
    def ledger(self) -> list[LedgerRow]:
        rows, shown = [], self.ledger_head[1:-1]
        for line in self._status.lines:
            # Zero is shown only for what is left.
            amounts = {name: getattr(line, name) for name in shown}
            known = {n: a for n, a in amounts.items() if a or (n == "left" and a is not None)}
            cells = [format_amount(line.resource, known[n]) if n in known else "–" for n in shown]
            share = (line.used + line.reserved) / line.quota if line.quota else None
            rows.append(LedgerRow([resource_title(line.resource), *cells], share))
        return rows

    @property
    def notes(self) -> list[str]:
        """What the ledger does not show: limits, when the quota ends, points refused."""
        limits = ", ".join(
            f"{get_resource(name).title} {format_amount(name, limit)}"
            for name, limit in self.trials.limits.items()
        )
        found = (limits and f"Limits on a trial: {limits}.", self._status.end, self.refused)
        return [note for note in found if note]

    @property
    def refused(self) -> str:
        """A sentence on the points that were refused; empty without any."""
        return refused_points(t.trial for t in self.finished)

    @property
    def outcomes(self) -> str:
        """A sentence on how the trials ended."""
        groups = by_outcome(self.finished).items()
        ended = ", ".join(f"{len(group):,} {outcome}" for outcome, group in groups)
        return f"{counted(len(self.finished), 'trial')} finished: {ended}."

    @property
    def headline(self) -> str:
        """Outcomes of the trials, the best value and the waste."""
        if not self.finished:
            return "No trial has finished yet."
        sentences = [self.outcomes]
        if (best := self._best()) is not None:
            value = best.trial.values[0]
            sentences.append(f"The best value, {value:.5g}, is that of trial {best.number}.")
        if self.waste.spent:
            sentences.append(f"{waste_finding(self.waste)}.")
        return " ".join(sentences)

    def _best(self) -> FinishedTrial | None:
        """Return the best completed trial of a study with one objective."""
        best = self.report.best if len(self.trials.study.directions) == 1 else []
        return next((t for t in self.finished if t.number in best), None)

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """Pairs of a figure and its meaning."""
        tiles = [(f"{len(self.finished):,}", "trials finished")]
        if (best := self._best()) is not None:
            tiles.append((f"{best.trial.values[0]:.4g}", f"best value, trial {best.number}"))
        memory = [trial.amounts["memory"] for trial in self.finished if "memory" in trial.amounts]
        if memory:
            tiles.append((format_amount("memory", max(memory)), "peak memory of a trial"))
        if self.waste.spent:
            resource, spent = next(iter(self.waste.spent.items()))
            total = format_amount(resource, sum(spent.values()))
            share = self.waste.share(resource, "terminated")
            tiles.append((total, get_resource(TOTAL_OF[resource]).title))
            tiles.append((f"{share:.0%}", "of it on terminated trials"))
        return tiles

    @property
    def drivers(self) -> list[DriverRow]:
        """What drives each resource, where that is clear."""
        found = self.report.drivers.items()
        return [DriverRow(name, each) for name, all_ in found for each in all_ if each.is_clear]

    @property
    def advice(self) -> list[Advice]:
        """What to change: bounds that would halve the cost first."""
        cheaper = self.report.cheaper_space
        bounds = [] if cheaper is None else [Advice("search space", str(cheaper), {})]
        return [*bounds, *self.report.advice]

    @property
    def ended(self) -> list[FinishedTrial]:
        """Trials that ended without a value, the latest first."""
        return [t for t in reversed(self.finished) if t.outcome in ENDED]

    def summary(self) -> str:
        """Return the report as text for a terminal."""
        blocks = [
            self._head_lines(),
            _usage_lines(self.report),
            self._driver_lines(),
            _front_lines(self.report.front),
            _advice_lines(self.advice),
            _correlation_lines(self.report.correlations),
            _model_lines(self.report),
        ]
        return "\n\n".join("\n".join(lines) for lines in map(list, blocks) if lines)

    def _head_lines(self) -> Iterator[str]:
        what = self.outcomes if self.finished else "no trial has finished, nothing to analyze yet."
        yield from wrap(f"Study {self.name!r}: {what}")
        yield from wrap(self.refused)

    def _driver_lines(self) -> Iterator[str]:
        """Return lines on parameters with a clear share of the variance, and their effect."""
        if self.report.data.is_conditional:
            yield from wrap(
                "What drives cost: not computed, as conditional parameters have no common range. "
                "The correlations below are within the branches."
            )
        elif self.drivers:
            yield from wrap(
                "What drives cost: shares of the variance of the logarithm over the range "
                "searched, 90% interval, by the footprint; the rest is noise and interactions"
            )
            for resource, drivers in self.report.drivers.items():
                if clear := [driver for driver in drivers if driver.is_clear]:
                    yield from _resource_driver_lines(get_resource(resource).title, clear)


def _resource_driver_lines(title: str, drivers: Sequence[Driver]) -> Iterator[str]:
    shares = ", ".join(
        f"{d.param} {d.share[1]:.0%} [{d.share[0]:.0%}, {d.share[2]:.0%}]" for d in drivers
    )
    yield from wrap(f"{title}: {shares}.", first="  ", indent="    ")
    factors, verb = [], f"multiplies the {title} by"
    for driver in drivers:
        if driver.clear_factor is not None:
            lower, median, upper = driver.clear_factor
            change = f"{'doubling' if driver.change > 1 else 'halving'} {driver.param}"
            factors.append(f"{change} {verb} {median:.2f} [{lower:.2f}, {upper:.2f}]")
            verb = "by"
    if factors:
        text = f"At the best trial, {', '.join(factors)}."
        yield from wrap(text, first="    ", indent="      ")


def refused_points(trials: Iterable[FrozenTrial]) -> str:
    """Return a sentence on the refused points of finished trials; empty without any.

    An audited point counts only if its trial completed or breached a limit.
    """
    counts: Counter[str] = Counter()
    for trial in trials:
        note = trial.user_attrs.get(PROPOSED)
        action = note.get("action") if isinstance(note, Mapping) else None
        if not trial.state.is_finished() or not isinstance(action, str):
            continue
        if action == "audited":
            record = read_record(trial)
            breached = record.breach is not None and not record.breach.quota
            if not breached and record.outcome != "completed":
                continue
            counts["wrong"] += not breached
        counts[action] += 1
    parts = [f"{counts[kind]} {kind}" for kind in ("redrawn", "moved", "rejected") if counts[kind]]
    audited, wrong = counts["audited"], counts["wrong"]
    if audited:
        share = f" ({wrong / audited:.0%} false refusals)" if audited >= _MIN_AUDITED else ""
        parts.append(
            f"{audited} run anyway as an audit, {wrong} of which stayed within the limits{share}"
        )
    total = sum(counts[kind] for kind in ("redrawn", "moved", "rejected", "audited"))
    return f"Points refused: {total} ({', '.join(parts)})." if total else ""


def _usage_lines(analysis: StudyAnalysis) -> Iterator[str]:
    if not analysis.data.resources:
        if len(analysis.table):
            yield from wrap("No trial has a known usage, so there is nothing to explain.")
        return
    yield f"{'Usage':<14}{'median':>14}{'maximum':>14}{'total':>14}   measured"
    for name in analysis.data.resources:
        known = analysis.table[name].dropna()
        total = "" if get_resource(name).peak else format_amount(name, float(known.sum()))
        yield (
            f"  {get_resource(name).title:<12}{format_amount(name, float(known.median())):>14}"
            f"{format_amount(name, float(known.max())):>14}{total:>14}"
            f"   {len(known)} of {len(analysis.table)} trials"
        )


def _front_lines(front: DataFrame | None) -> Iterator[str]:
    if front is None or len(front) < 2:
        return
    resource = front.columns[-1]
    title = get_resource(resource).title
    yield f"Cost against quality: the Pareto front of value and {title}"
    # Of many, the best and the cheapest of the others, evenly spread.
    shown = np.unique(np.linspace(0, len(front) - 1, _MAX_FRONT).round().astype(int))
    yield f"  {'trial':>7}{'value':>14}{title:>14}{'of the best':>14}"
    for number, value, cost in front.iloc[shown].itertuples(index=False):
        share = cost / front[resource].iloc[-1]
        yield f"  {number:>7}{value:>14.6g}{format_amount(resource, cost):>14}{share:>14.0%}"
    if len(shown) < len(front):
        yield f"  {len(front) - len(shown)} of {len(front)} are left out (`report.front` has all)."


def _advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    if advice:
        yield "Advice"
    for one in advice:
        yield from wrap(one.text, first="  - ", indent="    ")
        for snippet in one.snippets.values():
            yield from (f"      {line}" for line in snippet.splitlines())


def _correlation_lines(table: DataFrame) -> Iterator[str]:
    tested = int(table["p_value"].notna().sum())
    if not len(table):
        return
    if not tested:
        yield from wrap(
            f"Correlations: none computed. They need {MIN_TESTED} trials with a known usage in "
            "which both the hyperparameter and the usage vary."
        )
        return
    yield from wrap(
        f"Correlations (Spearman's rho, for categories the effect size epsilon²; 95% interval; "
        f"p after Holm's correction for {counted(tested, 'test')})"
    )
    found = claims(table)
    for row in found:
        yield from _correlation_line(row)
    if len(found) < tested:
        yield f"  Not significant (p >= 0.05): {tested - len(found)} of {tested}."


def _correlation_line(row: dict[str, Any]) -> Iterator[str]:
    sign = "" if row["measure"] == "epsilon2" else "+"
    p_value = "p < 0.001" if row["p_adjusted"] < 0.001 else f"p = {row['p_adjusted']:.3f}"
    figures = (
        f"{row['rho']:{sign}.2f} [{row['lower']:{sign}.2f}, {row['upper']:{sign}.2f}]"
        f"  {p_value}  n = {row['n']}"
    )
    branch = f"  within {row['branch']}" if row["branch"] else ""
    title, param = get_resource(row["resource"]).title, _cut(row["param"], 24)
    yield _cut(f"  {title:<12} {param:<24} {figures}{branch}", LINE_WIDTH)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _model_lines(analysis: StudyAnalysis) -> Iterator[str]:
    if not analysis.models and not analysis.missing_models:
        return
    yield from wrap(
        "Formulas (a floor plus a power law of the parameters over their middle; terms with "
        "p < 0.05 after Holm's correction, 95% intervals). To predict a number, use "
        "`report.footprint.predict(params)`."
    )
    for name, model in analysis.models.items():
        yield from wrap(analysis.formulas[name], first="  ", indent="      ")
        if not follows_law(analysis, name):
            continue
        data = analysis.data
        partial = int((np.isfinite(data.amounts(name)) & ~data.informative(name)).sum())
        basis = _basis(model, partial)
        if (error := analysis.prediction_errors.get(name)) is not None:
            basis += (
                f" Leave-one-out error {error.formula:.1%}, that of the footprint "
                f"{error.footprint:.1%}."
            )
        yield from wrap(basis, first="    ", indent="    ")
        for warning in analysis.model_warnings(name):
            yield from wrap(warning, first="    ! ", indent="      ")
    for reason in analysis.missing_models.values():
        yield from wrap(reason, first="  ", indent="    ")


def _basis(model: UtilizationModel, n_partial: int) -> str:
    table = model.coefficients
    clear = table[(table["p_adjusted"] < 0.05) & (table["kind"] == "exponent")]
    exponents = [
        f"{term} {row['estimate']:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"
        for term, row in clear.iterrows()
    ]
    counts = counted(model.n_observed, "trial")
    if model.n_censored:
        counts += f" and {counted(model.n_censored, 'lower bound')}"
    if n_partial:
        counts += f", {n_partial} left out as something else stopped them"
    shown = f"exponents {', '.join(exponents)}; " if exponents else ""
    percent = 100 * math.expm1(min(model.sigma, 20))
    scatter = f"{percent:.2g}" if percent < 99.5 else f"{percent:.0f}"
    above = " above the floor" if model.selected.fit.epsilon < 1 and model.floor else ""
    # The formula shows a constant then; the figures are of the fit with all terms.
    of = "" if model.has_clear_term else "With all terms together: "
    return f"{of}{shown}{counts}; scatter {scatter}%{above}."
