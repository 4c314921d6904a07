"""Time and energy spent on trials of each outcome."""

from __future__ import annotations

from typing import Any, NamedTuple, TYPE_CHECKING

from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource
from optuna_quota.visualization import _theme
from optuna_quota.visualization._data import by_outcome, StudyTrials


if TYPE_CHECKING:
    from optuna.study import Study
    import plotly.graph_objects as go


# What usage adds up to over trials: wall times to trial time.
TOTAL_OF = {usage: total for total, usage in CHARGED_RESOURCES.items()}


class Waste(NamedTuple):
    """Trials by outcome, and amounts spent by resource and outcome."""

    trials: dict[str, int]
    spent: dict[str, dict[str, float]]

    def share(self, resource: str, outcome: str) -> float:
        """Return the share of a resource's total that an outcome took, from 0 to 1."""
        total = sum(self.spent[resource].values())
        return self.spent[resource].get(outcome, 0.0) / total if total else 0.0


def plot_waste(study: Study) -> go.Figure:
    """Plot which share of time and energy went to trials of each outcome.

    Pruned, terminated and failed trials gave no value: what they took is the waste.

    Example:

        .. code-block:: python

            from optuna_quota.visualization import plot_waste

            plot_waste(study).show()

    Args:
        study: The study.

    Raises:
        ImportError: If plotly is not installed.
    """
    return waste_figure(StudyTrials(study))


def waste_of(trials: StudyTrials) -> Waste:
    """Return what trials of each outcome spent."""
    groups = by_outcome(trials.finished)
    spent = {
        name: {o: sum(t.amounts.get(name, 0.0) for t in group) for o, group in groups.items()}
        for name in TOTAL_OF
    }
    counts = {outcome: len(group) for outcome, group in groups.items()}
    return Waste(counts, {name: s for name, s in spent.items() if sum(s.values()) > 0})


def waste_figure(trials: StudyTrials) -> go.Figure:
    """Return the figure of :func:`plot_waste`: a bar for the trials and one for each resource."""
    title, waste = "Where the budget went", waste_of(trials)
    if not waste.spent:
        return _theme.empty_figure(title, "No finished trial has a known time.")
    x = {**_theme.axis("Share (%)", (0, 100)), "dtick": 20}
    y = {**_theme.axis(""), "autorange": "reversed", "ticks": ""}
    figure = _theme.make_figure(title, waste_finding(waste), _bars(waste), x, y)
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    return figure


def _bars(waste: Waste) -> list[dict[str, Any]]:
    names = ["Trials", *(_theme.resource_title(TOTAL_OF[r]) for r in waste.spent)]
    count = sum(waste.trials.values())
    bars = []
    for outcome, trials in waste.trials.items():
        shares = [trials / count, *(waste.share(r, outcome) for r in waste.spent)]
        amounts = [format_amount(r, s[outcome]) for r, s in waste.spent.items()]
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": outcome,
                "y": names,
                "x": [_theme.significant(100 * s, 4) for s in shares],
                "width": 0.6,
                "marker": {
                    "color": _theme.OUTCOMES[outcome].color,
                    "line": {"width": 1, "color": "#FFFFFF"},
                },
                "text": [f"{100 * s:.0f}%" if s >= 0.05 else "" for s in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "customdata": [f"{trials:,} of {count:,} trials", *amounts],
                "hovertemplate": f"{outcome}: %{{x:.1f}}%, %{{customdata}}<extra></extra>",
            }
        )
    return bars


def waste_finding(waste: Waste) -> str:
    """Return in a sentence what trials without a value took of the trial time."""
    resource = next(iter(waste.spent))
    parts = [
        f"{100 * waste.share(resource, outcome):.0f}% on {outcome}"
        for outcome in ("terminated", "pruned", "preempted", "failed")
        if waste.share(resource, outcome) > 0
    ]
    total = format_amount(resource, sum(waste.spent[resource].values()))
    lost = f": {', '.join(parts)} trials" if parts else ", none of it wasted"
    return f"{total} of {get_resource(TOTAL_OF[resource]).title}{lost}"
