"""Markdown from text that nobody vouches for: reasons, names and values out of a storage."""

from __future__ import annotations

from collections.abc import Sequence
import re


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
