"""What became of the points that were refused: read from the rows, audits included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_quota._records import PROPOSED
from optuna_quota._records import read_record


if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Vetoes:
    """Counts of refused points.

    Attributes:
        redrawn: Replaced by another draw of the base sampler.
        moved: Replaced by the nearest point that was admitted.
        rejected: Not replaced; the trial was not run.
        audited: Run all the same, to try the veto.
        wrong: Of the audited ones, those that stayed within their limits.
    """

    redrawn: int = 0
    moved: int = 0
    rejected: int = 0
    audited: int = 0
    wrong: int = 0

    @property
    def total(self) -> int:
        """All refused points."""
        return self.redrawn + self.moved + self.rejected + self.audited

    def __str__(self) -> str:
        kinds = {"redrawn": self.redrawn, "moved": self.moved, "rejected": self.rejected}
        parts = [f"{count} {kind}" for kind, count in kinds.items() if count]
        if self.audited:
            fit = f"{self.wrong} of them did fit ({self.wrong / self.audited:.0%} false vetoes)"
            parts.append(f"{self.audited} run to try the veto, {fit}")
        return f"Points refused: {self.total} ({', '.join(parts)})."


def count_vetoes(trials: Iterable[FrozenTrial]) -> Vetoes:
    """Return what became of the points that were refused in finished trials.

    A trial that was stopped for something else than a limit of its own, such as a base pruner,
    tells nothing of the veto and does not count as audited.
    """
    counts: Counter[str] = Counter()
    for trial in trials:
        note = trial.user_attrs.get(PROPOSED)
        action = note.get("action") if isinstance(note, Mapping) else None
        if not trial.state.is_finished() or not isinstance(action, str):
            continue
        if action != "audited":
            counts[action] += 1
            continue
        record = read_record(trial)
        if record.outcome == "completed" or record.breach is not None:
            counts["audited"] += 1
            counts["wrong"] += record.breach is None
    known = ("redrawn", "moved", "rejected", "audited", "wrong")
    return Vetoes(**{name: counts[name] for name in known})
