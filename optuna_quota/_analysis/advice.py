"""What to change, each with its figures and only where the data bear it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any


@dataclass(frozen=True)
class Advice:
    """One thing to know or to change.

    Attributes:
        topic: What it is about: ``requests``, ``search space``, ``n_jobs``, ``cheapest trial``,
            ``budget`` or ``last tenth``.
        text: A sentence or two for a person; ``str()`` of the advice.
        figures: The figures behind it, by name, in SI base units.
        snippets: Lines to paste, by where: ``kubernetes``, ``sbatch``.
    """

    topic: str
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    snippets: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text
