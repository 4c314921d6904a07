"""The two pictures that are tables at heart, as HTML tables, for where no script can run."""

from __future__ import annotations

from optuna_quota._resources import format_amount
from optuna_quota._resources import OUTCOMES
from optuna_quota.visualization import _style
from optuna_quota.visualization._correlations import _CorrelationsInfo
from optuna_quota.visualization._correlations import said
from optuna_quota.visualization._correlations import shade
from optuna_quota.visualization._markup import element
from optuna_quota.visualization._markup import Safe
from optuna_quota.visualization._markup import table
from optuna_quota.visualization._waste import _WasteInfo
from optuna_quota.visualization._waste import label


def waste_table(info: _WasteInfo) -> Safe:
    """Return what each outcome took of the time and the energy."""
    shown = [outcome for outcome in OUTCOMES if info.trials[outcome]]
    head = ["", "Trials", *(label(resource) for resource in info.spent)]
    rows: list[list[str | Safe]] = []
    for outcome in shown:
        cells = [_spent(info, resource, outcome) for resource in info.spent]
        rows.append([outcome, f"{info.trials[outcome]:,}", *cells])
    return table(head, rows, numeric=set(range(1, len(head))))


def _spent(info: _WasteInfo, resource: str, outcome: str) -> str:
    amount = info.spent[resource][outcome]
    if not amount:
        return "–"
    return f"{format_amount(resource, amount)} ({100 * info.share(resource, outcome):.0f}%)"


def correlations_table(info: _CorrelationsInfo) -> Safe:
    """Return the correlations, coloured as in the heat map."""
    head = ["", *(_style.title_of(resource) for resource in info.resources)]
    rows: list[list[str | Safe]] = [
        [param, *(_cell(info, param, resource) for resource in info.resources)]
        for param in info.params
    ]
    return table(head, rows, numeric=set(range(1, len(head))))


def _cell(info: _CorrelationsInfo, param: str, resource: str) -> str | Safe:
    cell = info.cells.get((param, resource))
    if cell is None:
        return ""
    strength = shade(cell)
    color = _style.VERMILION if strength > 0 else _style.BLUE
    alpha = round(255 * min(1.0, abs(strength)) * 0.8)
    text = element("b", said(cell)) if cell.certain else said(cell)
    return element("span", text, style=f"background:{color}{alpha:02x}", class_="cell")
