"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
import json
import math
import os
import re
import sys
from typing import Any, TYPE_CHECKING

from optuna_quota._units import align


if TYPE_CHECKING:
    import pandas as pd


_STYLES = {"bold": "1", "dim": "2", "green": "32", "yellow": "33", "red": "31"}
# The escape sequences that `styled` writes, and no others.
_STYLE = re.compile(r"(\x1b\[(?:0|[12]|3[123])m)")


def write_line(text: str = "") -> None:
    """Print text to standard output without control characters, except line ends and styles."""
    parts = _STYLE.split(text) if has_colour() else [text]
    parts[::2] = map(harmless, parts[::2])
    print("".join(parts))


def harmless(text: str) -> str:
    """Replace characters that could control a terminal: names come from the storage."""
    return "".join(c if c.isprintable() or c in "\n\u2002" else " " for c in text)


def write_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity are null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar of numpy's
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)


def as_json(found: Any, keys: Iterable[str], **computed: Any) -> dict[str, Any]:
    """Return the values of a command's documented keys: computed, or else attributes."""
    return {key: computed[key] if key in computed else getattr(found, key) for key in keys}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a DataFrame by column."""
    found: list[dict[str, Any]] = frame.astype(object).to_dict("records")
    return found


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done on standard error, where that is a terminal, until it is done.

    The function that is yielded shows what is done next.
    """

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    show(f"{text} …")
    try:
        yield lambda text: show(f"{text} …")
    finally:
        show("")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first column has names, the others figures."""
    first, *rest = align([header, *rows])
    rule = ("─" if encodes("─") else "-") * max(map(len, (first, *rest)))
    return [styled(first, "bold"), styled(rule, "dim"), *rest]


def styled(text: str, style: str) -> str:
    """Return the text in a style where standard output is a colour terminal."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if has_colour() else text


def has_colour() -> bool:
    """Return whether to colour: on a terminal, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def encodes(text: str) -> bool:
    """Return whether standard output can show the text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
