"""All figures of a study, and copies of them with fewer markers."""

from __future__ import annotations

import textwrap
from typing import Any

from optuna_quota._analysis.study_analysis import StudyAnalysis, trials_of
from optuna_quota._analysis.study_trials import measured_resources
from optuna_quota.visualization import _theme
from optuna_quota.visualization._cost import plot_burn_down, plot_objectives, plot_waste
from optuna_quota.visualization._footprint import plot_footprint, plot_reliability
from optuna_quota.visualization._params import plot_correlations, plot_usage_slice, varied_params
from optuna_quota.visualization._theme import Figure
from optuna_quota.visualization._usage import plot_timeline, plot_usage


_MAX_PANELS = 4
_MAX_TIMELINES = 2
# Characters of a subtitle that clear the toolbar where the dashboard is 800 pixels wide.
_NARROW = 42


def figures(report: StudyAnalysis) -> dict[str, Figure]:
    """Return all plots of a report as plotly figures by name, in reading order.

    Names are those of the functions without ``plot_``, with the resource: ``usage_memory``,
    ``burn_down``, ``waste``, ``correlations``, ``usage_slice_memory``, ``footprint_memory``,
    ``reliability``, ``quality_cost``, ``timeline_17`` and the like. Plots that the study has no
    data for are left out.

    Example:

        .. code-block:: python

            report = analyze(study)
            report.figures()["usage_memory"].show()

    Args:
        report: A :class:`~optuna_quota.UtilizationReport`.

    Raises:
        ImportError: If plotly is not installed.
    """
    finished = trials_of(report).finished
    resources = measured_resources(finished)
    ended = [t.number for t in finished if t.outcome == "terminated" and t.record.timeline]
    made = {
        **{f"usage_{r}": plot_usage(report, resource=r) for r in resources},
        "burn_down": plot_burn_down(report),
        "waste": plot_waste(report),
        "correlations": plot_correlations(report),
        **{f"usage_slice_{r}": plot_ranked_slices(report, r) for r in resources},
        **{f"footprint_{r}": plot_best_footprint(report, r) for r in resources},
        "reliability": plot_reliability(report),
        **plot_objectives(report),
        **{f"timeline_{n}": plot_timeline(report, n) for n in ended[-_MAX_TIMELINES:]},
    }
    return {name: figure for name, figure in made.items() if figure.data}


def plot_ranked_slices(
    report: StudyAnalysis, resource: str, max_panels: int = _MAX_PANELS
) -> Figure:
    """Return slices along the hyperparameters that the resource correlates with most."""
    varied = varied_params(trials_of(report).with_usage(resource))
    rows = report.correlations[report.correlations["resource"] == resource]
    ranked = [name for name in rows["param"] if name in varied]
    names = list(dict.fromkeys([*ranked, *varied]))[:max_panels]
    return plot_usage_slice(report, resource=resource, params=names, footprint=report.footprint)


def plot_best_footprint(report: StudyAnalysis, resource: str) -> Figure:
    """Return the recorded projections against usage, or the fitted ones where there are none."""
    recorded = plot_footprint(report, resource=resource)
    if recorded.data:
        return recorded
    return plot_footprint(report, resource=resource, footprint=report.footprint)


def thin(figure: Figure, max_markers: int) -> Figure:
    """Return a figure for a third of a page, with fewer markers; see :func:`thinned_json`."""
    spec = thinned_json(figure, max_markers)
    layout = spec["layout"]
    head, _, subtitle = layout["title"]["text"].partition("<br>")
    style, _, plain = subtitle.removesuffix("</span>").partition(">")
    lines = textwrap.wrap(plain, _NARROW)
    if lines:
        layout["title"]["text"] = f"{head}<br>{style}>{'<br>'.join(lines)}</span>"
        layout["margin"]["t"] += 17 * (len(lines) - 1)
    return _theme.import_plotly().Figure(spec)


def thinned_json(figure: Figure, max_markers: int, *, hover: bool = False) -> dict[str, Any]:
    """Return the JSON of a figure with fewer markers, to save space.

    At most ``max_markers`` are over all traces of a pair of axes; each trace keeps an even share,
    so that a rare outcome stays visible. ``hover`` keeps the texts shown at a marker.
    """
    spec: dict[str, Any] = figure.to_plotly_json()
    panels: dict[str, list[dict[str, Any]]] = {}
    for trace in spec["data"]:
        if trace.get("mode") == "markers":
            panels.setdefault(trace.get("xaxis", "x"), []).append(trace)
            if not hover:
                trace.pop("text", None)
                trace.pop("hovertemplate", None)
    total = shown = 0
    for traces in panels.values():
        count = sum(len(trace["x"]) for trace in traces)
        least = max(1, max_markers // (4 * len(traces)))
        for trace in traces:
            share = int(len(trace["x"]) * min(1.0, max_markers / count))
            _keep_markers(trace, max(least, share))
        _theme.size_markers(traces)
        total = max(total, count)
        shown = max(shown, sum(len(trace["x"]) for trace in traces))
    if shown < total:
        title = spec["layout"]["title"]
        note = f" ({shown:,} of {total:,} markers shown)</span>"
        title["text"] = title["text"].replace("</span>", note)
    return spec


def _keep_markers(trace: dict[str, Any], keep: int) -> None:
    n = len(trace["x"])
    if n <= keep:
        return
    kept = [round(i * (n - 1) / max(1, keep - 1)) for i in range(keep)]
    owners = ((trace, ("x", "y", "text")), (trace.get("error_y", {}), ("array", "arrayminus")))
    for owner, names in owners:
        for name in names:
            if name in owner:
                owner[name] = [owner[name][i] for i in kept]
    trace["type"] = "scatter"
