"""What is said in the notes, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from optuna_quota._resources import format_amount
from optuna_quota.dashboard._markdown import bar
from optuna_quota.dashboard._markdown import code
from optuna_quota.dashboard._markdown import escaped
from optuna_quota.dashboard._markdown import table
from optuna_quota.visualization._data import FinishedTrial
from optuna_quota.visualization._report_text import EndedRow
from optuna_quota.visualization._report_text import LedgerRow
from optuna_quota.visualization._report_text import ReportText
from optuna_quota.visualization._theme import resource_title


_ENDED = 30
_ADVICE = 6


def study_note(text: ReportText, address: Callable[[int], str]) -> str:
    """Return what is said about a study.

    Args:
        text: What is known.
        address: Gives the address of a trial's page by its number.
    """
    parts = ["### Use of resources", escaped(" ".join(text.headline))]
    parts += _ledger(text)
    if text.models:
        rows = [[escaped(model.title), code(model.formula)] for model in text.models]
        parts += ["#### What drives it", table(["resource", "fitted model"], rows)]
    if text.advice:
        shown = text.advice[:_ADVICE]
        items = (f"- {escaped(item.text)}" for item in shown)
        parts += ["#### What to change", "\n".join(items)]
    if text.ended:
        parts += _ended(text.ended, address)
    return "\n\n".join(parts)


def _ledger(text: ReportText) -> list[str]:
    parts = []
    if text.ledger:
        head = ["resource", "used", "reserved", "left", "quota", "of the quota"]
        rows = [_ledger_cells(line) for line in text.ledger]
        parts += ["#### Ledger", table(head, rows, right=(1, 2, 3, 4))]
    said = []
    if text.limits:
        limits = ", ".join(f"{title} {amount}" for title, amount in text.limits)
        said.append(f"Limits on a trial: {limits}.")
    if text.end:
        said.append(text.end)
    return [*parts, escaped(" ".join(said))] if said else parts


def _ledger_cells(line: LedgerRow) -> list[str]:
    amounts = (line.title, line.used, line.reserved, line.left, line.quota)
    share = "" if line.share is None else bar(line.share)
    return [*(escaped(text) for text in amounts), share]


def _ended(ended: Sequence[EndedRow], address: Callable[[int], str]) -> list[str]:
    rows = [
        [f"[{row.number}]({address(row.number)})", row.outcome, escaped(row.reason)]
        for row in ended[:_ENDED]
    ]
    parts = ["#### Terminated and rejected trials"]
    parts.append(table(["trial", "outcome", "reason"], rows, right=(0,)))
    if len(ended) > _ENDED:
        parts.append(f"… and {len(ended) - _ENDED:,} earlier ones.")
    return parts


def trial_note(row: FinishedTrial, limits: Mapping[str, float], picture: str | None) -> str:
    """Return what is said about a trial that was terminated or rejected.

    Args:
        row: The trial.
        limits: Limits in force, by resource, in SI base units.
        picture: Address of the picture of its memory over time.
    """
    reason = row.record.reason or "No reason was recorded."
    parts = [f"**{row.outcome.capitalize()}.** {escaped(reason)}"]
    cells = _usage_cells(row, limits)
    if cells:
        parts.append(table(["resource", "used", "limit", "share"], cells, right=(1, 2, 3)))
    projected = _projected_cells(row)
    if projected:
        head = ["resource", "projected", "lower", "upper"]
        parts.append(table(head, projected, right=(1, 2, 3)))
    if picture is not None:
        parts.append(f"![Memory over time, with the limit]({picture})")
    return "\n\n".join(parts)


def _usage_cells(row: FinishedTrial, limits: Mapping[str, float]) -> list[list[str]]:
    known = dict(limits)
    breach = row.record.breach
    if breach is not None:
        known[breach.resource] = breach.limit
    return [
        _usage_line(row, name, amount, known.get(name)) for name, amount in row.amounts.items()
    ]


def _usage_line(row: FinishedTrial, name: str, amount: float, limit: float | None) -> list[str]:
    shown = "" if limit is None else format_amount(name, limit)
    share = "" if not limit else f"{100 * amount / limit:.0f}%"
    used = row.format_usage(name)
    return [escaped(resource_title(name)), used, shown, share]


def _projected_cells(row: FinishedTrial) -> list[list[str]]:
    return [
        [
            escaped(resource_title(name)),
            *(format_amount(name, v) for v in (i.median, i.lower, i.upper)),
        ]
        for name, i in row.record.footprint.items()
    ]
