"""What was projected for each trial against what it used, and against breaches."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import math
import statistics
from typing import NamedTuple

from optuna.study import Study

from optuna_quota._analysis.study_analysis import StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import (
    by_outcome,
    FinishedTrial,
    predict_intervals,
    StudyTrials,
)
from optuna_quota._footprint.footprint import Footprint, joint_breach
from optuna_quota._records import Interval, PROPOSED
from optuna_quota._resources import format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._theme import Figure, OutcomeStyle, Point


# Fewer trials with a verdict are not compared with their probabilities.
_MIN_TRIALS = 20
_LEVEL = 0.95
_NORMAL = statistics.NormalDist()
_BINS = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
_STYLES = {
    "as drawn": OutcomeStyle(_theme.BLUE, "circle"),
    "in place of a refused point": OutcomeStyle(_theme.VERMILION, "square"),
    "refused, run as an audit": OutcomeStyle(_theme.PURPLE, "diamond"),
}


def plot_footprint(
    study: Study | StudyAnalysis, *, resource: str = "memory", footprint: Footprint | None = None
) -> Figure:
    """Plot the footprint projected for each trial, with its interval, against its usage.

    Projections are those recorded before each trial ran. With ``footprint``, they are that model's
    for the same points: how well it fits, not how well it projected.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_footprint

            plot_footprint(study, resource="memory").show()

    Args:
        study: The study, or its report.
        resource: The resource projected.
        footprint: A fitted :class:`~optuna_quota.Footprint`.

    Raises:
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    verb = "Projected" if footprint is None else "Fitted"
    title = f"{verb} against measured {get_resource(resource).title}"
    used = trials.with_usage(resource)
    if footprint is None:
        projected = [trial.record.footprint.get(resource) for trial in used]
    else:
        projected = predict_intervals(footprint, [t.trial.params for t in used], resource)
    pairs = zip(used, projected, strict=True)
    intervals = {trial.number: found for trial, found in pairs if found is not None}
    shown = [trial for trial in used if trial.number in intervals]
    if not shown:
        reason = f"No trial has both a projected and a measured {resource}."
        return _theme.empty_figure(title, reason)
    # The upper bounds of the first trials are wide: bars may leave the frame.
    amounts = [v for t in shown for v in (t.amounts[resource], intervals[t.number].median)]
    unit, log = _theme.unit_for(resource, amounts), _theme.use_log_scale(amounts, 20)
    low, high = _theme.axis_range(amounts, log=log)
    if not log and min(amounts) > 0.4 * max(amounts):
        low = min(amounts) - 0.1 * (max(amounts) - min(amounts) or min(amounts))

    def point(trial: FinishedTrial) -> Point:
        interval = intervals[trial.number]
        lower, median, upper = (
            format_amount(resource, v) for v in (interval.lower, interval.median, interval.upper)
        )
        hover = trial.hover(resource, f"projected {median} ({lower} to {upper})")
        bounds = unit.of(interval.lower), unit.of(min(interval.upper, 4 * high))
        x, y = unit.of(trial.amounts[resource]), unit.of(interval.median)
        return Point(x, y, hover, bounds)

    frame = (unit.of(low), unit.of(high))
    traces = [_theme.line("as projected", _theme.MUTED, frame, frame, dash="dot")]
    for outcome, group in by_outcome(shown).items():
        name = f"{outcome} ({len(group)})"
        traces.append(_theme.markers(name, _theme.OUTCOMES[outcome], [point(t) for t in group]))
    known = [t for t in shown if not t.is_censored(resource)]
    return _theme.make_figure(
        title,
        _finding([(t.amounts[resource], intervals[t.number]) for t in known]),
        traces,
        _theme.axis(unit.axis_title("Measured"), frame, log=log),
        _theme.axis(unit.axis_title(verb), frame, log=log),
    )


def _finding(known: Sequence[tuple[float, Interval]]) -> str:
    if not known:
        return "bars: lower to upper bound"
    errors = [abs(interval.median - used) / used for used, interval in known if used > 0]
    error = f"median error {100 * statistics.median_high(errors):.1f}%; " if errors else ""
    held = sum(used <= interval.upper for used, interval in known)
    return f"{error}{held} of {len(known)} trials within the upper bound; bars: lower to upper"


class JudgedTrial(NamedTuple):
    """A trial that completed or breached a limit, with its projection.

    Attributes:
        group: Whether its point ran as drawn, replaced a refused one, or was an audit.
        probability: The projected probability that it breaches any limit.
        breached: Whether it did.
    """

    group: str
    probability: float
    breached: bool


def plot_reliability(study: Study | StudyAnalysis) -> Figure:
    """Plot how often trials breached a limit against the probability projected for them.

    Trials that completed, or that a limit stopped, are counted by the probability that their
    recorded footprint gives, in bins: at least 20 of them. Bars are 90% intervals of the share
    (Wilson, Journal of the American Statistical Association 22, 1927).

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_reliability

            plot_reliability(study).show()

    Args:
        study: The study, or its report. Its sampler's ``confidence`` is taken to be the default.

    Raises:
        ImportError: If plotly is not installed.
    """
    trials = trials_of(study)
    title = "Breaches against their projected probability"
    judged = judged_trials(trials)
    if len(judged) < _MIN_TRIALS:
        reason = f"{len(judged)} trials have a projection and a verdict; it takes {_MIN_TRIALS}."
        return _theme.empty_figure(title, reason)
    traces = [_theme.line("as projected", _theme.MUTED, (0, 100), (0, 100), dash="dot")]
    for group, style in _STYLES.items():
        members = [each for each in judged if each.group == group]
        if members:
            traces.append(_theme.markers(f"{group} ({len(members)})", style, _points(members)))
    axes = (
        _theme.axis(f"{name} (%)", (-2, 102)) for name in ("Projected probability", "Breached")
    )
    return _theme.make_figure(title, _breach_finding(judged), traces, *axes)


def judged_trials(trials: StudyTrials) -> list[JudgedTrial]:
    """Return the trials that completed or breached a limit, and for which one was projected."""
    found = []
    for trial in trials.finished:
        breach = trial.record.breach
        chances = {
            name: breach_probability(interval, trials.limits[name])
            for name, interval in trial.record.footprint.items()
            if name in trials.limits
        }
        # A trial stopped by another limit shows neither.
        breached = breach is not None and not breach.quota and breach.resource in chances
        if chances and (breached or trial.outcome == "completed"):
            found.append(JudgedTrial(_group_of(trial), joint_breach(chances), breached))
    return found


def _group_of(trial: FinishedTrial) -> str:
    drawn, replaced, audited = _STYLES
    proposed = trial.trial.user_attrs.get(PROPOSED)
    if not isinstance(proposed, dict):
        return drawn
    return audited if proposed.get("action") == "audited" else replaced


def breach_probability(interval: Interval, limit: float) -> float:
    """Return the probability of more than a limit, from the recorded quantiles of a footprint.

    Its logarithm above a floor is symmetric, so the three quantiles give the floor.
    """
    lower, median, upper = interval.lower, interval.median, interval.upper
    skew = lower + upper - 2 * median
    floor = (lower * upper - median * median) / skew if skew > 0 else 0.0
    floor = min(max(floor, 0.0), lower)
    if limit <= floor or not floor < median < upper:
        return float(median > limit)
    spread = math.log((upper - floor) / (median - floor)) / _NORMAL.inv_cdf(_LEVEL)
    return 1 - _NORMAL.cdf(math.log((limit - floor) / (median - floor)) / spread)


def _points(judged: Sequence[JudgedTrial]) -> list[Point]:
    from scipy.stats import binomtest

    points = []
    for low, high in itertools.pairwise(_BINS):
        members = [j for j in judged if low <= j.probability < high or j.probability == high == 1]
        if members:
            n, breaches = len(members), sum(each.breached for each in members)
            ends = binomtest(breaches, n).proportion_ci(2 * _LEVEL - 1, method="wilson")
            expected = sum(each.probability for each in members)
            hover = f"{breaches} of {n} trials breached, {expected:.1f} projected"
            x, y = 100 * expected / n, 100 * breaches / n
            points.append(Point(x, y, hover, (100 * ends.low, 100 * ends.high)))
    return points


def _breach_finding(judged: Sequence[JudgedTrial]) -> str:
    breaches = sum(each.breached for each in judged)
    expected = sum(each.probability for each in judged)
    deviation = math.sqrt(sum(each.probability * (1 - each.probability) for each in judged))
    away = breaches - expected
    more = "more" if away > 0 else "fewer"
    verdict = "within chance" if abs(away) <= 1.645 * deviation else f"{more} than by chance"
    return f"{breaches} of {len(judged)} trials breached, {expected:.1f} projected: {verdict}"
