"""All figures of a study, and copies of them with fewer markers."""

from __future__ import annotations

import textwrap
from typing import Any

from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota.visualization import _theme
from optuna_quota.visualization._budget import burn_down_figure, waste_figure
from optuna_quota.visualization._correlations import correlations_figure
from optuna_quota.visualization._data import measured_resources, StudyTrials
from optuna_quota.visualization._footprint import footprint_figure, reliability_figure
from optuna_quota.visualization._quality_cost import quality_cost_figures
from optuna_quota.visualization._theme import Figure
from optuna_quota.visualization._timeline import timeline_figure, timeline_of
from optuna_quota.visualization._usage import usage_figure, usage_slice_figure, varied_params


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
    return figures_of(StudyTrials(report.study, report.data), report)


def figures_of(trials: StudyTrials, report: StudyAnalysis) -> dict[str, Figure]:
    """Return :func:`figures` of trials that were already read."""
    resources = measured_resources(trials.finished)
    made = {f"usage_{r}": usage_figure(trials, r) for r in resources}
    made["burn_down"] = burn_down_figure(trials)
    made["waste"] = waste_figure(trials)
    made["correlations"] = correlations_figure(report.correlations)
    for resource in resources:
        made[f"usage_slice_{resource}"] = ranked_slice_figure(trials, report, resource)
    for resource in resources:
        made[f"footprint_{resource}"] = best_footprint_figure(trials, report, resource)
    made["reliability"] = reliability_figure(trials)
    made.update(quality_cost_figures(trials))
    ended = [t for t in trials.finished if t.outcome == "terminated" and t.record.timeline]
    for trial in ended[-_MAX_TIMELINES:]:
        made[f"timeline_{trial.number}"] = timeline_figure(timeline_of(trial, trials.limits))
    return {name: figure for name, figure in made.items() if figure.data}


def ranked_slice_figure(
    trials: StudyTrials, report: StudyAnalysis, resource: str, max_panels: int = _MAX_PANELS
) -> Figure:
    """Return slices along the hyperparameters that the resource correlates with most."""
    varied = varied_params(trials.with_usage(resource))
    rows = report.correlations[report.correlations["resource"] == resource]
    ranked = [name for name in rows["param"] if name in varied]
    names = list(dict.fromkeys([*ranked, *varied]))[:max_panels]
    return usage_slice_figure(trials, resource, names, report.footprint)


def best_footprint_figure(trials: StudyTrials, report: StudyAnalysis, resource: str) -> Figure:
    """Return the recorded projections against usage, or the fitted ones where there are none."""
    recorded = footprint_figure(trials, resource)
    return recorded if recorded.data else footprint_figure(trials, resource, report.footprint)


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
