"""When a trial asks for more of a quota, and how long a breach waits for the answer (pure)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from optuna_quota._resources import Breach


# Share of a slice at which more is asked for, so that the answer comes before it is used up.
ASK_AT = 0.8
# Seconds that a breach of a slice waits for an answer: part of the stopping latency.
PATIENCE = 1.0
# Seconds after which what was refused is asked for again: others may have given back theirs.
ASK_AGAIN = 0.2

Ceilings = Mapping[str, tuple[float, bool]]


class Renewal:
    """What a trial asked for of the study's quotas, and what was answered.

    Args:
        ask: Asks for more; the answer is :meth:`answer`.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._is_due = False
        self._asked: float | None = None
        self._next = 0.0
        self._refused: set[str] = set()

    def review(
        self,
        breaches: Sequence[Breach],
        amounts: Mapping[str, float],
        ceilings: Ceilings,
        now: float,
    ) -> list[Breach]:
        """Return the breaches that do not wait for an answer; ask when a slice runs low.

        Args:
            breaches: All that were found.
            amounts: What the trial uses, by resource.
            ceilings: What it may use, and whether for now, as its slice of a quota.
            now: The time in seconds.
        """
        near = any(amounts.get(n, 0.0) >= ASK_AT * s for n, s in _slices(ceilings).items())
        if near and self._asked is None and now >= self._next:
            self._asked, self._is_due = now, True
        return [breach for breach in breaches if not self._holds_back(breach, now)]

    def _holds_back(self, breach: Breach, now: float) -> bool:
        if not _can_grow(breach.resource, breach.quota) or breach.resource in self._refused:
            return False
        return self._asked is None or now - self._asked < PATIENCE

    def answer(self, before: Ceilings, after: Ceilings, now: float) -> None:
        """Take in new slices: those that did not grow were refused."""
        old = _slices(before)
        self._refused = {n for n, s in _slices(after).items() if s <= old.get(n, 0.0)}
        self._asked = None
        self._next = now + ASK_AGAIN if self._refused else now

    def take_ask(self) -> Callable[[], None] | None:
        """Return what asks for more, once each time that it is due."""
        due, self._is_due = self._is_due, False
        return self._ask if due else None

    def deadline(self, started: float, ceilings: Ceilings, now: float) -> float | None:
        """Return when the clock alone calls for a review, None for never.

        Args:
            started: When the trial started.
            ceilings: As for :meth:`review`.
            now: The time in seconds.
        """
        marks = []
        for name in ("wall_time", "trial_time"):
            ceiling, quota = ceilings.get(name, (None, False))
            if ceiling is not None:
                marks.append(started + ceiling)
                if _can_grow(name, quota):
                    marks.append(started + ASK_AT * ceiling)
        marks = [mark for mark in marks if mark > now]
        if self._asked is not None:
            marks.append(max(now, self._asked + PATIENCE))
        return min(marks, default=None)


def _can_grow(resource: str, quota: bool) -> bool:
    # The study's clock runs for all its trials alike: nobody can give back any of it.
    return quota and resource != "wall_time"


def _slices(ceilings: Ceilings) -> dict[str, float]:
    return {n: ceiling for n, (ceiling, quota) in ceilings.items() if _can_grow(n, quota)}
