"""The marked block: the only part of a note that is ours.

The marks are link definitions, which Markdown shows as nothing; optuna-dashboard shows HTML
comments as text.
"""

from __future__ import annotations

import re


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
