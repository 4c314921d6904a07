"""The HTML report, one self-contained file, and its short form for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
import json
import os
from pathlib import Path

from optuna_quota._analysis.study_analysis import follows_law, StudyAnalysis
from optuna_quota._html import element, prose, Safe, table
from optuna_quota._resources import format_amount
from optuna_quota._version import __version__
from optuna_quota.visualization import _theme
from optuna_quota.visualization._cost import TOTAL_OF
from optuna_quota.visualization._figures import figures, thinned_json
from optuna_quota.visualization._params import Cell, correlation_cells
from optuna_quota.visualization._report_text import DRIVERS, ReportText


_WIDE = "usage_slice"
_MAX_ENDED = 200
# More markers hide each other and add megabytes.
_MAX_MARKERS = 1000
_TOP = 24
# Signs in JSON that could end a script element or a line of it.
_SCRIPT_SIGNS = "<>&\u2028\u2029"


def to_html(
    report: StudyAnalysis, path: str | os.PathLike[str], *, interactive: bool = True
) -> None:
    """Write a report as one HTML file that needs neither a network nor other files.

    Example:

        .. code-block:: python

            analyze(study).to_html("report.html")

    Args:
        report: A :class:`~optuna_quota.UtilizationReport`.
        path: The file; an existing one is replaced.
        interactive: Whether to include the plots, for which plotly.js goes into the file (5 MB).
            Without them, and without plotly, the file has tables and no script (20 kB).
    """
    text = ReportText(report)
    plotted = interactive and find_spec("plotly") is not None
    parts = _plots(text) if plotted else _tables(text)
    if interactive and not plotted:
        parts.append(element("p", _theme.MISSING_PLOTLY))
    head = element(
        "head",
        Safe('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        element("title", f"Resource usage of {text.name}"),
        element("style", Safe(_read("report.css"))),
    )
    body = element("body", element("main", *_sections(text, parts), class_="oq"), style="margin:0")
    page = f'<!DOCTYPE html><html lang="en">{head}{body}</html>\n'
    # A name may hold half of a surrogate pair, which UTF-8 can't encode.
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def notebook_html(report: StudyAnalysis) -> str:
    """Return the report for a notebook: texts and tables without a script."""
    text = ReportText(report)
    sections = _sections(text, [*_tables(text), element("p", prose("Plots: `report.figures()`."))])
    return element("div", element("style", Safe(_read("report.css"))), *sections, class_="oq")


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sections(text: ReportText, parts: Sequence[Safe]) -> list[Safe]:
    tiles = [element("div", element("b", t), element("span", what)) for t, what in text.tiles]
    return [
        element("h1", "Resource usage of ", element("em", text.name)),
        element("p", text.headline, class_="lead"),
        element("div", *tiles, class_="tiles"),
        *_ledger(text),
        *_advice(text),
        *_models(text),
        *parts,
        *_ended(text),
        element("footer", f"optuna_quota {__version__}"),
    ]


def _ledger(text: ReportText) -> list[Safe]:
    parts = [element("h2", "Ledger")]
    if text.ledger:
        rows = [[*line.cells, _bar(line.share)] for line in text.ledger]
        right = range(1, len(text.ledger_head) - 1)
        parts.append(table(["", *text.ledger_head[1:]], rows, right=right, name="wide resources"))
    else:
        parts.append(element("p", "No quota is set and no usage is known."))
    return parts + [element("p", prose(note)) for note in text.notes]


def _bar(share: float | None, text: str = "") -> Safe:
    if share is None:
        return Safe("")
    width = f"width:{min(100.0, 100 * share):.1f}%"
    bar = element("span", element("i", style=width, class_="over" if share > 1 else "in"))
    return element("span", bar, f" {text or f'{share:.0%}'}", class_="share")


def _advice(text: ReportText) -> list[Safe]:
    items = [
        element("li", prose(row.text), *(element("pre", lines) for lines in row.snippets.values()))
        for row in text.advice
    ]
    return [element("h2", "What to change"), element("ul", *items)] if items else []


def _models(text: ReportText) -> list[Safe]:
    parts = []
    if text.drivers:
        head = ["", "parameter", "share", "changed"]
        rows = [
            [d.title, d.driver.param, _bar(d.driver.share[1], d.share), d.change]
            for d in text.drivers
        ]
        parts = [element("h2", "What drives usage"), element("p", DRIVERS)]
        parts.append(table(head, rows, name="wide resources"))
    report = text.report
    if report.formulas:
        parts.append(element("h2", "Fitted models"))
    for name, formula in report.formulas.items():
        parts.append(element("p", element("b", _theme.resource_title(name)), class_="model"))
        is_law = follows_law(report, name)
        parts.append(element("pre", formula) if is_law else element("p", prose(formula)))
        if warnings := report.model_warnings(name):
            parts.append(element("ul", *(element("li", prose(each)) for each in warnings)))
    return parts


def _ended(text: ReportText) -> list[Safe]:
    ended = text.ended
    if not ended:
        return []
    rows = [[str(t.number), t.outcome, t.reason, t.main_usage()] for t in ended[:_MAX_ENDED]]
    head = ["trial", "outcome", "reason", "used"]
    parts = [element("h2", "Terminated, rejected and failed trials")]
    parts.append(table(head, rows, name="wide ended"))
    if len(ended) > _MAX_ENDED:
        parts.append(element("p", f"… and {len(ended) - _MAX_ENDED:,} earlier ones."))
    return parts


def _tables(text: ReportText) -> list[Safe]:
    """Return what the plots of waste and correlations show, as tables."""
    parts: list[Safe] = []
    waste = text.waste
    if waste.spent:
        head = ["", "Trials", *(_theme.resource_title(TOTAL_OF[r]) for r in waste.spent)]
        rows = []
        for outcome, count in waste.trials.items():
            rows.append([outcome, f"{count:,}"])
            for resource, spent in waste.spent.items():
                amount = format_amount(resource, spent[outcome])
                share = f"{amount} ({waste.share(resource, outcome):.0%})"
                rows[-1].append(share if spent[outcome] else "–")
        parts.append(element("h2", "Where the budget went"))
        parts.append(table(head, rows, right=range(1, len(head))))
    resources, cells = correlation_cells(text.report.correlations)
    if cells:
        legend = (
            "Spearman's correlation, an effect size (epsilon²) for categories. A star marks what "
            "is significant after the correction for multiple tests."
        )
        head = ["", *map(_theme.resource_title, resources)]
        rows = [[param, *map(_correlation, row)] for param, row in cells.items()]
        parts.append(element("h2", "What drives usage: rank correlations"))
        parts.append(element("p", legend))
        parts.append(table(head, rows, right=range(1, len(head))))
    return parts


def _correlation(cell: Cell | None) -> str:
    if cell is None:
        return ""
    color = _theme.VERMILION if cell.shade > 0 else _theme.BLUE
    style = f"background:{_theme.translucent(color, 0.8 * min(1.0, abs(cell.shade)))}"
    shown = element("b", str(cell)) if cell.is_significant else str(cell)
    return element("span", shown, style=style, class_="cell")


def _plots(text: ReportText) -> list[Safe]:
    made = figures(text.report)
    if not made:
        return []
    places, specs = [], {}
    for name, figure in made.items():
        spec = thinned_json(figure, _MAX_MARKERS, hover=True)
        # A caption wraps where a title in the plot would be cut.
        caption = Safe(spec["layout"].pop("title")["text"])
        spec["layout"]["margin"]["t"] = _TOP
        specs[f"oq-{name}"] = spec
        places.append(
            element(
                "figure",
                element("figcaption", caption),
                element("div", id_=f"oq-{name}", class_="plot"),
                class_="wide" if name.startswith(_WIDE) else "half",
            )
        )
    # plotly's encoder writes null for NaN, for which JSON has no word.
    encoder = _theme.import_plotly("plotly.utils").PlotlyJSONEncoder
    encoded = json.dumps(specs, cls=encoder, separators=(",", ":"))
    for sign in _SCRIPT_SIGNS:  # a tenth of the time of `str.translate`
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    library = _theme.import_plotly("plotly.offline").get_plotlyjs()
    return [
        element("h2", "Plots"),
        element("div", *places, class_="grid"),
        element("script", Safe(library)),
        element("script", Safe(f"const figures = {encoded};\n{_read('report.js')}")),
    ]
