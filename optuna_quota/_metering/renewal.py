"""When a trial asks for more of a quota, and how long a breach waits for the answer (pure).

What a trial was granted is a promise, and the answer to a question that it asked while it was
already over it is the only thing that ends it: an earlier refusal says nothing of what others
have given back since. Until then what bounds it is its own limit, or the quota as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from optuna_quota._metering.breach import Ceilings
from optuna_quota._resources import Breach
from optuna_quota._resources import HELD_RESOURCES


# Share of a slice at which more is asked for, so that the answer comes before it is used up.
ASK_AT = 0.8
# The same of what is held at one moment: a promise is no slice, and most trials come near it
# without outgrowing it.
ASK_AT_HELD = 0.9
# Seconds that a breach of a slice waits for an answer. On a busy machine, or while a database
# server restarts, it comes late; where nobody answers at all, the trial must end.
PATIENCE = 10.0
# Seconds after which what was refused is asked for again: others may have given back theirs.
ASK_AGAIN = 0.2


def ask_at(resource: str) -> float:
    """Return the share of what was granted at which more is asked for."""
    return ASK_AT_HELD if resource in HELD_RESOURCES else ASK_AT


class Renewal:
    """What a trial asked for of the study's quotas, and what was answered.

    Args:
        ask: Asks for more; the answer is :meth:`answer`.

    Attributes:
        needs: What the trial used of the resources that it asked for last, as it asked.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self.needs: Mapping[str, float] = {}
        self._ask = ask
        self._is_due = False
        self._asked: float | None = None
        self._over: set[str] = set()
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
        over = {b.resource for b in breaches if _can_grow(b.resource, b.quota)}
        near = {n for n, s in _slices(ceilings).items() if amounts.get(n, 0.0) >= ask_at(n) * s}
        is_due = over - self._refused or (near and now >= self._next)
        if is_due and self._asked is None:
            self._asked, self._is_due, self._over = now, True, over
            self.needs = {name: amounts.get(name, 0.0) for name in sorted(near | over)}
        return [breach for breach in breaches if not self._holds_back(breach, now)]

    def _holds_back(self, breach: Breach, now: float) -> bool:
        if not _can_grow(breach.resource, breach.quota) or breach.resource in self._refused:
            return False
        return self._asked is None or now - self._asked < PATIENCE

    def answer(self, before: Ceilings, after: Ceilings, now: float) -> None:
        """Take in new slices: what the trial was over and did not grow was refused."""
        old, new = _slices(before), _slices(after)
        grown = {name for name, amount in new.items() if amount > old.get(name, 0.0)}
        # Nothing at all is left for a trial that is to end at once.
        self._refused = {name for name, amount in new.items() if amount <= 0}
        self._refused |= self._over - grown
        self._over = set()
        self._asked = None
        self._next = now if self.needs.keys() <= grown else now + ASK_AGAIN

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
