"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime
import json
import math
import os
import re
import sys
from typing import Any
from typing import TextIO
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import pandas as pd


_STYLES = {"bold": "1", "dim": "2", "green": "32", "yellow": "33", "red": "31"}
# What `styled` puts around words, and nothing else that begins alike.
_STYLE = re.compile(r"\x1b\[(?:0|[12]|3[123])(?:;(?:[12]|3[123]))*m")


def write_line(text: str = "") -> None:
    """Print text to standard output: of its signs of control, line ends and styles alone stay."""
    if not has_colour(sys.stdout):
        print(harmless(text))
        return
    styles = [*_STYLE.findall(text), ""]
    parts = zip(_STYLE.split(text), styles, strict=True)
    print("".join(harmless(part) + style for part, style in parts))


def harmless(text: str) -> str:
    """Return text that can't steer a terminal: names in it are whatever a storage holds."""
    return "".join(c if c.isprintable() or c in "\n\u2002" else " " for c in text)


def write_json(value: Any) -> None:
    """Print a value as JSON; what is no number (NaN, infinity) is null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a DataFrame by column."""
    found: list[dict[str, Any]] = frame.astype(object).to_dict("records")
    return found


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Say on standard error what is being done, where that is a terminal; gone when it is done.

    Args:
        what: What is being done first; the function given tells what is done next.
    """

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text} …", end="", file=sys.stderr, flush=True)

    say(what)
    try:
        yield say
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Return a value made of what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if type(value).__name__ in ("bool_", "bool"):  # numpy's
        return bool(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if hasattr(value, "__float__"):
        return _plain_number(float(value))
    return str(value)


def _plain_number(number: float) -> float | int | None:
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Return the lines of a table.

    Args:
        header: Names of the columns.
        rows: Cells.
        texts: How many columns, from the left, are text; figures are set flush right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ("─" if encodes("─") else "-") * (sum(widths) + 2 * (len(widths) - 1))
    first, *rest = (_row(row, widths, texts) for row in (header, *rows))
    return [styled(first, "bold"), styled(rule, "dim"), *rest]


def _row(cells: Sequence[str], widths: Sequence[int], texts: int) -> str:
    padded = (
        cell.ljust(width) if i < texts else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def styled(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """Return the text in a style where the stream is a terminal that has colours.

    Args:
        text: What to print.
        styles: Names among ``bold``, ``dim``, ``green``, ``yellow``, ``red``.
        stream: Where it is printed; standard output by default.
    """
    if not has_colour(stream or sys.stdout):
        return text
    codes = ";".join(_STYLES[style] for style in styles)
    return f"\x1b[{codes}m{text}\x1b[0m"


def has_colour(stream: TextIO) -> bool:
    """Return whether to colour: on a terminal, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def encodes(text: str) -> bool:
    """Return whether standard output can show the text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
