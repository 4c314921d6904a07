"""HTML that is escaped by construction."""

from __future__ import annotations

import html
import json
from typing import Any


class Safe(str):
    """Text that is HTML already; any other text is escaped when it is put into an element."""

    __slots__ = ()


def element(tag: str, *children: str | Safe, **attributes: str) -> Safe:
    """Return an element; the underscore at the end of ``class_`` and the like is dropped.

    Args:
        tag: Name of the element.
        children: What it holds; text that is not :class:`Safe` is escaped.
        attributes: Its attributes; values are escaped.
    """
    shown = "".join(
        f' {name.strip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
    )
    inner = "".join(c if isinstance(c, Safe) else html.escape(c) for c in children)
    return Safe(f"<{tag}{shown}>{inner}</{tag}>")


def table(
    head: list[str], rows: list[list[str | Safe]], *, numeric: set[int] | None = None
) -> Safe:
    """Return a table.

    Args:
        head: Titles of the columns.
        rows: Cells by row.
        numeric: Columns aligned to the right.
    """
    right = numeric or set()
    titles = [element("th", t, class_="n" if i in right else "t") for i, t in enumerate(head)]
    body = [
        element(
            "tr", *(element("td", c, class_="n" if i in right else "t") for i, c in enumerate(r))
        )
        for r in rows
    ]
    inner = element("thead", element("tr", *titles)) + element("tbody", *body)
    return element("div", element("table", Safe(inner)), class_="wide")


def script_json(value: Any) -> Safe:
    """Return JSON that may stand inside a script element: no ``<``, so nothing can close it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Safe(text)
