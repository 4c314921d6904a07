"""What the doctor found: a value with its reason, never a bare flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


State = Literal["ok", "degraded", "missing"]
Area = Literal["stopping", "measuring", "host", "software", "storage"]


@dataclass(frozen=True)
class Finding:
    """One thing that this host can do, can do less well, or cannot do.

    Attributes:
        area: The part it belongs to.
        check: What was looked at.
        state: ``ok``, ``degraded`` (it works, with less) or ``missing``.
        found: What is there, in one sentence.
        degrades: What is worse for it; empty when nothing is.
        fix: What a person can do about it; empty when there is nothing.
    """

    area: Area
    check: str
    state: State
    found: str
    degrades: str = ""
    fix: str = ""
