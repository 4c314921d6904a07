"""The report as text for a terminal, at most 100 columns wide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import math
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.correlations import claims, MIN_TRIALS
from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._records import PROPOSED, read_record
from optuna_quota._resources import format_amount, get_resource, OUTCOMES
from optuna_quota._table import DataFrame
from optuna_quota._units import counted, LINE_WIDTH, wrap
from optuna_quota._utilization.model import UtilizationModel


# Fewer audits give no meaningful share.
_MIN_AUDITED = 4
_MAX_FRONT = 8


def summarize(analysis: StudyAnalysis) -> str:
    blocks = [
        _head(analysis),
        _usage_lines(analysis),
        _driver_lines(analysis),
        wrap(str(analysis.cheaper_space or "")),
        _front_lines(analysis),
        _advice_lines(analysis.advice),
        _correlation_lines(analysis.correlations),
        _model_lines(analysis),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, blocks) if lines)


def _head(analysis: StudyAnalysis) -> Iterator[str]:
    name = repr(analysis.study.study_name)
    counts = Counter(o for o in analysis.data.ended if o is not None)
    if not counts:
        yield f"Study {name}: no trial has finished, nothing to analyze yet."
        return
    ended = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
    yield from wrap(f"Study {name}: {counted(counts.total(), 'trial')} finished: {ended}.")
    refused = refused_points(analysis.data.trials)
    if refused:
        yield from wrap(refused)


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


def _driver_lines(analysis: StudyAnalysis) -> Iterator[str]:
    """Return lines on parameters with a clear share of the variance, and their effect."""
    lines = []
    for resource, drivers in analysis.drivers.items():
        clear = [d for d in drivers if d.is_clear]
        if not clear:
            continue
        title = get_resource(resource).title
        shares = ", ".join(
            f"{d.param} {d.share[1]:.0%} [{d.share[0]:.0%}, {d.share[2]:.0%}]" for d in clear
        )
        lines += wrap(f"{title}: {shares}.", first="  ", indent="    ")
        factors, verb = [], f"multiplies the {title} by"
        for driver in clear:
            if driver.clear_factor is not None:
                lower, median, upper = driver.clear_factor
                change = "doubling" if driver.change > 1 else "halving"
                factors.append(
                    f"{change} {driver.param} {verb} {median:.2f} [{lower:.2f}, {upper:.2f}]"
                )
                verb = "by"
        if factors:
            text = f"At the best trial, {', '.join(factors)}."
            lines += wrap(text, first="    ", indent="      ")
    if analysis.data.is_conditional:
        yield from wrap(
            "What drives cost: not computed, as conditional parameters have no common range. The "
            "correlations below are within the branches."
        )
    elif lines:
        yield from wrap(
            "What drives cost: shares of the variance of the logarithm over the range searched, "
            "90% interval, by the footprint; the rest is noise and interactions"
        )
        yield from lines


def _front_lines(analysis: StudyAnalysis) -> Iterator[str]:
    front = analysis.front
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
        yield f"  {len(front) - len(shown)} of {len(front)} are left out (report.front has all)."


def _correlation_lines(table: DataFrame) -> Iterator[str]:
    tested = int(table["p_value"].notna().sum())
    if not len(table):
        return
    if not tested:
        yield from wrap(
            f"Correlations: none computed. They need {MIN_TRIALS} trials with a known usage in "
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


def _model_lines(analysis: StudyAnalysis) -> Iterator[str]:
    if not analysis.models and not analysis.missing_models:
        return
    yield from wrap(
        "Formulas (a floor plus a power law of the parameters over their middle; terms with "
        "p < 0.05 after Holm's correction, 95% intervals). To predict a number, use "
        "report.footprint.predict(params)."
    )
    for name, model in analysis.models.items():
        yield from wrap(analysis.formulas[name], first="  ", indent="      ")
        error = analysis.prediction_errors.get(name)
        if error is not None and error.is_wrong:
            continue
        data = analysis.data
        partial = int((np.isfinite(data.amounts(name)) & ~data.informative(name)).sum())
        basis = _basis(model, partial)
        if error is not None:
            basis += (
                f" Leave-one-out error {error.formula:.1%}, that of the footprint "
                f"{error.footprint:.1%}."
            )
        yield from wrap(basis, first="    ", indent="    ")
        for warning in analysis.model_warnings(name):
            yield from wrap(warning, first="    ! ", indent="      ")
    for reason in analysis.missing_models.values():
        yield from wrap(reason, first="  ", indent="    ")


def _advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    if advice:
        yield "Advice"
    for one in advice:
        yield from wrap(one.text, first="  - ", indent="    ")
        for snippet in one.snippets.values():
            yield from (f"      {line}" for line in snippet.splitlines())


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
