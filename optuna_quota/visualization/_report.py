"""The HTML report: one file that needs nothing else, and its short form for notebooks."""

from __future__ import annotations

from importlib import resources
import os
from pathlib import Path
from typing import Any

from optuna_quota._version import __version__
from optuna_quota.visualization._chart import thinned
from optuna_quota.visualization._charts import charts_of
from optuna_quota.visualization._charts import figures_of
from optuna_quota.visualization._charts import Material
from optuna_quota.visualization._charts import material_of
from optuna_quota.visualization._correlations import _get_correlations_info
from optuna_quota.visualization._facts import Facts
from optuna_quota.visualization._facts import facts_of
from optuna_quota.visualization._imports import import_plotly
from optuna_quota.visualization._markup import element
from optuna_quota.visualization._markup import Safe
from optuna_quota.visualization._markup import script_json
from optuna_quota.visualization._markup import table
from optuna_quota.visualization._svg import svg_of
from optuna_quota.visualization._tables import correlations_table
from optuna_quota.visualization._tables import waste_table
from optuna_quota.visualization._waste import _get_waste_info


_WIDE = ("usage_slice",)
# What a notebook shows; the file has everything.
_NOTEBOOK = ("usage_memory", "usage_wall_time", "burn_down", "quality_cost")
_MARKS = 400
_ENDED = 200


def to_html(report: Any, path: str | os.PathLike[str], *, interactive: bool = True) -> None:
    """Write a report as one HTML file that needs no network and nothing beside it.

    Example:

        .. code-block:: python

            analyze(study).to_html("report.html")

    Args:
        report: A :class:`~optuna_quota.UtilizationReport`.
        path: Where to.
        interactive: Whether the pictures answer to the mouse, for which plotly.js goes into the
            file (5 MB); otherwise they are drawn as SVG, without any script.

    Raises:
        ImportError: If ``interactive`` and plotly is not installed.
    """
    page = page_of(report, interactive=interactive)
    # Half of a surrogate pair, which JSON keeps in a name, has no place in UTF-8.
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def page_of(report: Any, *, interactive: bool = True) -> str:
    """Return the page that :func:`to_html` writes."""
    material = material_of(report.study, report)
    facts = facts_of(material, report)
    pictures = _interactive(material) if interactive else _static(material)
    title = f"Resource use of {facts.name}"
    head = element(
        "head",
        Safe('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        element("title", title),
        element("style", Safe(_style_sheet())),
    )
    body = element("body", element("main", *_sections(facts, pictures), class_="oq"))
    return f'<!DOCTYPE html><html lang="en">{head}{body}</html>\n'


def notebook_html(report: Any) -> str:
    """Return the report for a notebook: tables and four pictures, no script, about 50 kB."""
    material = material_of(report.study, report)
    facts = facts_of(material, report)
    charts = {name: c for name, c in charts_of(material).items() if name in _NOTEBOOK}
    pictures = [_figure(Safe(svg_of(thinned(c, _MARKS)))) for c in charts.values()]
    style = element("style", Safe(_style_sheet()))
    grid = [element("div", *pictures, class_="grid")] if pictures else []
    inner = _sections(facts, [*grid, *_tables(material)])
    return element("div", style, *inner, class_="oq")


def _style_sheet() -> str:
    return resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")


def _sections(facts: Facts, pictures: list[Safe]) -> list[Safe]:
    return [
        element("h1", "Resource use of ", element("em", facts.name)),
        element("p", " ".join(facts.headline), class_="lead"),
        element("div", *(_tile(*tile) for tile in facts.tiles), class_="tiles"),
        *_ledger(facts),
        *_advice(facts),
        *_models(facts),
        *([element("h2", "Pictures"), *pictures] if pictures else []),
        *_ended(facts),
        element("footer", f"optuna_quota {__version__}"),
    ]


def _tile(figure: str, what: str) -> Safe:
    return element("div", element("b", figure), element("span", what))


def _ledger(facts: Facts) -> list[Safe]:
    parts = [element("h2", "Ledger")]
    if facts.ledger:
        rows: list[list[str | Safe]] = [
            [line.title, line.used, line.reserved, line.left, line.quota, _share(line.share)]
            for line in facts.ledger
        ]
        head = ["", "used", "reserved", "left", "quota", "of the quota"]
        parts.append(table(head, rows, numeric={1, 2, 3, 4}))
    else:
        parts.append(element("p", "No quota is set and no usage is known."))
    if facts.limits:
        limits = ", ".join(f"{title} {amount}" for title, amount in facts.limits)
        parts.append(element("p", f"Limits on a trial: {limits}."))
    if facts.end:
        parts.append(element("p", facts.end))
    return parts


def _share(share: float | None) -> Safe:
    if share is None:
        return Safe("–")
    width = f"width:{min(100.0, 100 * share):.1f}%"
    bar = element("span", element("i", style=width, class_="over" if share > 1 else "in"))
    return Safe(element("span", bar, f" {100 * share:.0f}%", class_="share"))


def _advice(facts: Facts) -> list[Safe]:
    if not facts.advice:
        return []
    items = [
        element("li", item.text, *(element("pre", lines) for lines in item.snippets.values()))
        for item in facts.advice
    ]
    return [element("h2", "What to change"), element("ul", *items, class_="advice")]


def _models(facts: Facts) -> list[Safe]:
    if not facts.models:
        return []
    parts = [element("h2", "What drives it: fitted models")]
    for model in facts.models:
        parts.append(element("p", element("b", model.title), class_="model"))
        parts.append(element("pre", model.formula))
        if model.warnings:
            parts.append(element("ul", *(element("li", w) for w in model.warnings)))
    return parts


def _ended(facts: Facts) -> list[Safe]:
    if not facts.ended:
        return []
    rows: list[list[str | Safe]] = [
        [str(row.number), row.outcome, row.reason, row.used] for row in facts.ended[:_ENDED]
    ]
    parts = [
        element("h2", "Terminated and rejected trials"),
        table(["trial", "outcome", "reason", "used"], rows, numeric={0}),
    ]
    if len(facts.ended) > _ENDED:
        parts.append(element("p", f"… and {len(facts.ended) - _ENDED:,} earlier ones."))
    return parts


def _figure(inner: Safe, *, wide: bool = False) -> Safe:
    return element("figure", inner, class_="wide" if wide else "half")


def _tables(material: Material) -> list[Safe]:
    parts: list[Safe] = []
    waste = _get_waste_info(material.study, material.rows)
    if waste.spent:
        parts += [element("h2", "Where the budget went"), waste_table(waste)]
    if material.correlations is not None:
        info = _get_correlations_info(material.correlations)
        if info.cells:
            parts += [element("h2", "What goes with it: rank correlations"), _legend()]
            parts.append(correlations_table(info))
    return parts


def _legend() -> Safe:
    return element(
        "p",
        "Spearman's correlation, an effect size (epsilon²) for categories; a star marks what is "
        "beyond chance after the correction for many tests.",
    )


def _static(material: Material) -> list[Safe]:
    pictures = []
    for name, chart in charts_of(material).items():
        wide = name.startswith(_WIDE)
        svg = svg_of(thinned(chart, 5 * _MARKS), width=1180 if wide else 580)
        pictures.append(_figure(Safe(svg), wide=wide))
    grid = [element("div", *pictures, class_="grid")] if pictures else []
    return [*grid, *_tables(material)]


def _interactive(material: Material) -> list[Safe]:
    made = figures_of(material)
    if not made:
        return []
    places = [
        _figure(element("div", id_=f"oq-{name}", class_="plot"), wide=name.startswith(_WIDE))
        for name in made
    ]
    data = {f"oq-{name}": figure.to_plotly_json() for name, figure in made.items()}
    library = import_plotly("plotly.offline").get_plotlyjs()
    return [
        element("div", *places, class_="grid"),
        element("script", Safe(library)),
        element("script", Safe(f"const figures = {_plain(data)};\n{_SCRIPT}")),
    ]


def _plain(data: Any) -> Safe:
    import json

    encoder = import_plotly("plotly.utils").PlotlyJSONEncoder
    return script_json(json.loads(json.dumps(data, cls=encoder)))


_SCRIPT = """
const config = {responsive: true, displaylogo: false, displayModeBar: "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  if (figure.layout.height) place.style.height = figure.layout.height + "px";
  Plotly.newPlot(place, figure.data, figure.layout, config);
}
const fit = () => Object.keys(figures).forEach(id => Plotly.Plots.resize(id));
window.addEventListener("beforeprint", fit);
window.addEventListener("afterprint", fit);
"""
