"""Reads what the package wrote into a note."""

from __future__ import annotations

from optuna_quota.dashboard import BEGIN, END


def block_of(note: str) -> str | None:
    """Return the content of the last block of a note, None without one."""
    begin, end = note.rfind(BEGIN), note.rfind(END)
    return None if begin < 0 or end < begin else note[begin + len(BEGIN) : end].strip()
