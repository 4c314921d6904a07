"""The projected probability of a breach against the share of trials that breached."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import math
from statistics import NormalDist
from typing import NamedTuple, TYPE_CHECKING

from optuna_quota._footprint.footprint import joint_breach
from optuna_quota._records import PROPOSED
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import FinishedTrial, StudyTrials
from optuna_quota.visualization._theme import OutcomeStyle, Point


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go

    from optuna_quota._records import Interval


_MIN_TRIALS = 20
_LEVEL = 0.95
_NORMAL = NormalDist()
_BINS = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
_STYLES = {
    "as drawn": OutcomeStyle(_theme.BLUE, "circle"),
    "in place of a refused point": OutcomeStyle(_theme.VERMILION, "square"),
    "refused, run as an audit": OutcomeStyle(_theme.PURPLE, "diamond"),
}


class JudgedTrial(NamedTuple):
    """A trial whose limits had a verdict.

    Attributes:
        group: Whether its point ran as drawn, replaced a refused one, or was an audit.
        probability: The projected probability that it breaches any limit.
        breached: Whether it did.
    """

    group: str
    probability: float
    breached: bool


def plot_reliability(study: Study) -> go.Figure:
    """Plot how often trials breached a limit against the probability projected for them.

    Trials that completed, or that a limit stopped, are counted by the probability that their
    recorded footprint gives, in bins: at least 20 of them. Bars are 90% intervals of the share
    (Wilson, Journal of the American Statistical Association 22, 1927).

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_reliability

            plot_reliability(study).show()

    Args:
        study: The study. Its sampler's ``confidence`` is taken to be the default.

    Raises:
        ImportError: If plotly is not installed.
    """
    return reliability_figure(StudyTrials(study))


def reliability_figure(trials: StudyTrials) -> go.Figure:
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
    return _theme.make_figure(title, _finding(judged), traces, *axes)


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
        # One that another limit stopped shows neither.
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
    points = []
    for low, high in itertools.pairwise(_BINS):
        members = [j for j in judged if low <= j.probability < high or j.probability == high == 1]
        if members:
            n, breaches = len(members), sum(each.breached for each in members)
            ends = _wilson_interval(breaches / n, n)
            expected = sum(each.probability for each in members)
            hover = f"{breaches} of {n} trials breached, {expected:.1f} projected"
            x, y = 100 * expected / n, 100 * breaches / n
            points.append(Point(x, y, hover, ends))
    return points


def _wilson_interval(share: float, n: int) -> tuple[float, float]:
    z = _NORMAL.inv_cdf(_LEVEL)
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + (z / n / 2) ** 2),
    )
    scale = 100 / (1 + z * z / n)
    return scale * (middle - half), scale * (middle + half)


def _finding(judged: Sequence[JudgedTrial]) -> str:
    breaches = sum(each.breached for each in judged)
    expected = sum(each.probability for each in judged)
    deviation = math.sqrt(sum(each.probability * (1 - each.probability) for each in judged))
    away = breaches - expected
    more = "more" if away > 0 else "fewer"
    verdict = "within chance" if abs(away) <= 1.645 * deviation else f"{more} than by chance"
    return f"{breaches} of {len(judged)} trials breached, {expected:.1f} projected: {verdict}"
