"""HTML elements, sentences and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import html
import re


class Safe(str):
    """Text that is HTML already; any other text is escaped when it is put into an element."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: object) -> Safe:
    """Return an element; the underscore at the end of ``class_`` and the like is dropped.

    Args:
        tag: Name of the element.
        children: Its contents; text that is not :class:`Safe` is escaped.
        attributes: Its attributes; values are escaped.
    """
    shown = "".join(
        f' {name.strip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    inner = "".join(c if isinstance(c, Safe) else html.escape(c) for c in children)
    return Safe(f"<{tag}{shown}>{inner}</{tag}>")


def prose(text: str) -> Safe:
    """Return a sentence with what stands between backticks as code."""
    parts = re.split("`([^`]+)`", text)
    return Safe(
        "".join(element("code", p) if i % 2 else html.escape(p) for i, p in enumerate(parts))
    )


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    name: str = "wide",
) -> Safe:
    """Return a table that scrolls where it is wider than the page.

    Args:
        head: Titles of the columns.
        rows: Cells by row.
        right: Columns aligned to the right, whose cells don't wrap.
        name: Its class.
    """
    styles = dict.fromkeys(right, "text-align:right;white-space:nowrap")

    def cells(tag: str, row: Sequence[str]) -> Safe:
        made = (element(tag, c, style=styles.get(i, "text-align:left")) for i, c in enumerate(row))
        return element("tr", *made)

    inner = (
        element("thead", cells("th", head)),
        element("tbody", *(cells("td", row) for row in rows)),
    )
    return element(
        "div", element("table", *inner), class_=name, style="overflow-x:auto;margin-bottom:8px"
    )
