"""The notes on studies and trials, as Markdown.

The part of a note that is ours is a block between two marks: link definitions, which Markdown does
not show; optuna-dashboard shows HTML comments as text. All text from the storage is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
import re

from optuna_quota._records import Interval
from optuna_quota._resources import format_amount, USAGE_RESOURCES
from optuna_quota.visualization._data import FinishedTrial
from optuna_quota.visualization._report_text import DRIVERS, ReportText
from optuna_quota.visualization._theme import resource_title


_MARKUP = re.compile(r"([\\`*_\[\]<>#|~!&$])")
# At the start of a line these begin a list, a heading's underline or a rule.
_LINE_START = re.compile(r"^(\s*)(\d*)([-+=.)])")
_BACKTICKS = re.compile(r"`+")
# GitHub's Markdown links bare URLs even where their punctuation is escaped; a word joiner, which
# has no width, breaks them up.
_URL = re.compile(r"(?i)(www|https?|ftp|mailto|xmpp)(?=[.:])|(?<=\S)(?=@\S)")
_WORD_JOINER = "\u2060"
_NBSP = "\u00a0"
_MAX_LENGTH = 300


def escape(text: str) -> str:
    """Return text without markup or links, in one line of at most 300 characters."""
    plain = _URL.sub(lambda m: m[0] + _WORD_JOINER, _one_line(text))
    return _LINE_START.sub(r"\1\2\\\3", _MARKUP.sub(r"\\\1", plain))


def code(text: str) -> str:
    """Return text as a code span that is valid in a table cell."""
    plain = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(plain)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{plain}{pad}{fence}".replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Return a table of cells that are Markdown already, some columns aligned to the right."""
    marks = ["---:" if i in right else ":---" for i in range(len(head))]
    # The dashboard's cells have no padding; Markdown keeps en spaces. Amounts don't wrap.
    padded = [
        [
            f"\u2002{c if i and i not in right else c.replace(' ', _NBSP)}\u2002"
            for i, c in enumerate(row)
        ]
        for row in (head, *rows)
    ]
    lines = (padded[0], marks, *padded[1:])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def bar(share: float, width: int = 20) -> str:
    """Return a bar of block characters for a share from 0 to 1, with the percentage."""
    filled = round(width * min(1.0, max(0.0, share)))
    return "█" * filled + "░" * (width - filled) + f" {100 * share:.0f}%"


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _MAX_LENGTH else shown[: _MAX_LENGTH - 1] + "…"


BEGIN = "[//]: # (optuna_quota: begin. Rewritten when published; write above or below.)"
END = "[//]: # (optuna_quota: end)"

_BEGIN = r"^\[//\]: # \(optuna_quota: begin[^\n]*$"
_END = r"^\[//\]: # \(optuna_quota: end\)[^\S\n]*$"
# From the last begin before an end: a begin without its end belongs to the person's text.
_BLOCK = re.compile(rf"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.MULTILINE | re.DOTALL)


def replace_block(note: str, content: str) -> str:
    """Return a note with new content in our block and all other text unchanged.

    The first block is replaced in place and copies of it are removed; without one, it is appended.
    """
    block = f"{BEGIN}\n\n{content.strip()}\n\n{END}"
    found = list(_BLOCK.finditer(note))
    if not found:
        gap = "" if not note or note.endswith("\n\n") else "\n" if note.endswith("\n") else "\n\n"
        return f"{note}{gap}{block}\n"
    parts = [note[: found[0].start()], block]
    for match, following in zip(found, [*found[1:], None], strict=True):
        parts.append(note[match.end() : following.start() if following else None])
    return "".join(parts)


_MAX_ENDED = 30
_MAX_ADVICE = 7


def study_note(text: ReportText, trial_url: Callable[[int], str]) -> str:
    """Return the note on a study; ``trial_url`` returns the page of a trial by its number."""
    parts = ["### Resource usage", escape(text.headline)]
    if text.ledger:
        rows = [
            [*map(escape, line.cells), "" if line.share is None else bar(line.share)]
            for line in text.ledger
        ]
        right = range(1, len(text.ledger_head) - 1)
        parts += ["#### Ledger", table(text.ledger_head, rows, right=right)]
    if text.notes:
        parts.append(escape(" ".join(text.notes)))
    if text.drivers:
        head = ["resource", "hyperparameter", "share", "changed"]
        rows = [[d.title, code(d.param), d.interval, d.change] for d in text.drivers]
        parts += ["#### What drives usage", table(head, rows, right=(2, 3)), DRIVERS]
    if text.models:
        rows = [[escape(title), code(formula)] for title, formula, _ in text.models]
        parts += ["#### Fitted models", table(["resource", "fitted model"], rows)]
    advice = text.advice[:_MAX_ADVICE]
    if advice:
        parts += ["#### What to change", "\n".join(f"- {escape(row.text)}" for row in advice)]
    ended = text.ended
    if ended:
        rows = [
            [f"[{row.number}]({trial_url(row.number)})", row.outcome, escape(row.reason)]
            for row in ended[:_MAX_ENDED]
        ]
        parts.append("#### Terminated, rejected and failed trials")
        parts.append(table(["trial", "outcome", "reason"], rows, right=(0,)))
    if len(ended) > _MAX_ENDED:
        parts.append(f"… and {len(ended) - _MAX_ENDED:,} earlier ones.")
    return "\n\n".join(parts)


def trial_note(row: FinishedTrial, limits: Mapping[str, float], image: str | None) -> str:
    """Return the note on a trial that was terminated or rejected, or that failed.

    ``limits`` are in SI base units, ``image`` is the URL of the plot of its usage over time.
    """
    reason = row.record.reason or "No reason was recorded."
    parts = [f"**{row.outcome.capitalize()}.** {escape(reason)}"]
    breach = row.record.breach
    if breach is not None:
        limits = {**limits, breach.resource: breach.limit}
    if row.amounts:
        cells = [_usage_cells(row, name, limits.get(name)) for name in row.amounts]
        parts.append(table(["resource", "used", "limit", "share"], cells, right=(1, 2, 3)))
    projected = row.record.footprint
    if projected:
        known = [name for name in USAGE_RESOURCES if name in projected]
        names = dict.fromkeys([*known, *projected])
        cells = [_projected_cells(name, projected[name]) for name in names]
        head = ["resource", "projected", "lower", "upper"]
        parts += ["Projected before it ran:", table(head, cells, right=(1, 2, 3))]
    if image is not None:
        parts.append(f"![Usage over time, with the limit]({image})")
    return "\n\n".join(parts)


def _usage_cells(row: FinishedTrial, name: str, limit: float | None) -> list[str]:
    shown = "" if limit is None else format_amount(name, limit)
    share = "" if not limit else f"{row.amounts[name] / limit:.0%}"
    return [escape(resource_title(name)), row.format_usage(name), shown, share]


def _projected_cells(name: str, interval: Interval) -> list[str]:
    amounts = (interval.median, interval.lower, interval.upper)
    return [escape(resource_title(name)), *(format_amount(name, amount) for amount in amounts)]
