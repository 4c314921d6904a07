"""What is said in the notes, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import re

from optuna_quota._resources import format_amount
from optuna_quota.visualization._data import FinishedTrial
from optuna_quota.visualization._report_text import EndedRow
from optuna_quota.visualization._report_text import LedgerRow
from optuna_quota.visualization._report_text import ReportText
from optuna_quota.visualization._theme import resource_title


_MARKUP = re.compile(r"([\\`*_\[\]<>#|~!&$])")
# At the start of a line these begin a list, a heading's underline or a rule.
_LINE_START = re.compile(r"^(\s*)(\d*)([-+=.)])")
_BACKTICKS = re.compile(r"`+")
# GitHub's Markdown makes links of bare addresses even where their signs are escaped; a word
# joiner, which has no width, breaks them up.
_ADDRESS = re.compile(r"(?i)(www|https?|ftp|mailto|xmpp)(?=[.:])|(?<=\S)(?=@\S)")
_JOINER = "\u2060"
_LONGEST = 300


def escaped(text: str) -> str:
    """Return text that is shown as it is: no markup, no link, one line, of bounded length."""
    plain = _ADDRESS.sub(lambda m: m[0] + _JOINER, _one_line(text))
    return _LINE_START.sub(r"\1\2\\\3", _MARKUP.sub(r"\\\1", plain))


def code(text: str) -> str:
    """Return text as a code span that also stands in a cell of a table."""
    plain = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(plain)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{plain}{pad}{fence}".replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table of cells that are Markdown already.

    Args:
        head: Titles of the columns.
        rows: Cells by row.
        right: Columns aligned to the right.
    """
    marks = ["---:" if i in right else ":---" for i in range(len(head))]
    spaced = [[_spaced(cell) for cell in row] for row in (head, *rows)]
    lines = (spaced[0], marks, *spaced[1:])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _spaced(cell: str) -> str:
    # The dashboard sets cells edge to edge: en spaces, which Markdown keeps, part them.
    return f"\u2002{cell}\u2002"


def bar(share: float, width: int = 20) -> str:
    """Return a bar of block signs for a share from 0 to 1, with the percentage."""
    filled = round(width * min(1.0, max(0.0, share)))
    return "█" * filled + "░" * (width - filled) + f" {100 * share:.0f}%"


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


BEGIN = "[//]: # (optuna_quota: begin. Rewritten when published; write above or below.)"
END = "[//]: # (optuna_quota: end)"

_BEGIN = r"^\[//\]: # \(optuna_quota: begin[^\n]*$"
_END = r"^\[//\]: # \(optuna_quota: end\)[^\S\n]*$"
# From the last begin before an end: a begin that lost its end belongs to the person's text.
_BLOCK = re.compile(rf"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.MULTILINE | re.DOTALL)


def merged(note: str, content: str) -> str:
    """Return a note with our block renewed and every other character as it was.

    Args:
        note: The note as it stands; the first block in it is replaced where it is, copies of it
            are removed. Without one, the block goes to the end.
        content: What the block shall hold.
    """
    block = f"{BEGIN}\n\n{content.strip()}\n\n{END}"
    found = list(_BLOCK.finditer(note))
    if not found:
        return f"{note}{_gap(note)}{block}\n"
    parts = [note[: found[0].start()], block]
    for match, following in zip(found, [*found[1:], None], strict=True):
        parts.append(note[match.end() : following.start() if following else None])
    return "".join(parts)


def block_of(note: str) -> str | None:
    """Return what our block in a note holds, None where there is none."""
    match = _BLOCK.search(note)
    if match is None:
        return None
    return "\n".join(match[0].split("\n")[1:-1]).strip()


def _gap(note: str) -> str:
    if not note or note.endswith("\n\n"):
        return ""
    return "\n" if note.endswith("\n") else "\n\n"


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
