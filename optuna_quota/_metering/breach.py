"""The one rule for what is a breach (pure): metering, stops, deaths and forecasts all ask here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import NamedTuple

from optuna_quota._resources import Breach
from optuna_quota._resources import get_resource
from optuna_quota._resources import HELD_RESOURCES


# The rate of two busy threads reads as 1.98 to 2.03 cores, blurred by the scheduler's clock ticks
# and the loop's own time. A trial breaches `cpu_cores` only beyond this factor.
CORES_SLACK = 1.05

# Allocations are rounded up, and what native code last asked for is unknown when it ends the
# process instead of raising: a failure this close to a limit is a failure at the limit.
AT_LIMIT = 0.95


class Ceiling(NamedTuple):
    """The most that a trial may use of one resource, in SI base units.

    Attributes:
        limit: The amount.
        quota: Whether it is what is left of a quota of the study, not a limit of the trial.
    """

    limit: float
    quota: bool = False


# Plain pairs will do as well.
Ceilings = Mapping[str, tuple[float, bool]]


def tightest_ceilings(
    limits: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, Ceiling]:
    """Return the ceiling in force by resource: the limit or what is left of the quota."""
    ceilings = {name: Ceiling(limit) for name, limit in limits.items()}
    for name, amount in left.items():
        if name not in ceilings or amount < ceilings[name].limit:
            ceilings[name] = Ceiling(max(amount, 0.0), quota=True)
    return ceilings


def is_breach(resource: str, amount: float, limit: float) -> bool:
    """Return whether an amount breaches a limit.

    A peak may equal its limit; a total that has reached it is used up.
    """
    if resource == "cpu_cores":
        return amount > limit * CORES_SLACK
    return amount > limit if get_resource(resource).peak else amount >= limit


def find_breaches(
    amounts: Mapping[str, float | None],
    ceilings: Ceilings,
    elapsed: float,
    *,
    forecast: bool = False,
) -> list[Breach]:
    """Return all breaches, the furthest over its limit first.

    Args:
        amounts: What the trial uses by resource, in SI base units; missing or None is unknown and
            breaches nothing.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
        forecast: Whether the amounts are what the trial is heading for.
    """
    found = [
        Breach(name, limit, amount, elapsed, quota=quota, forecast=forecast)
        for name, (limit, quota) in ceilings.items()
        if (amount := amounts.get(name)) is not None and is_breach(name, amount, limit)
    ]
    return sorted(found, key=_ratio, reverse=True)


def find_refused_breach(
    resource: str,
    wanted: float,
    ceilings: Ceilings,
    elapsed: float,
    *,
    share: float = AT_LIMIT,
    refused: bool = True,
) -> Breach | None:
    """Return the breach of a trial that was refused what it wanted, None when it was not near.

    Args:
        resource: The resource.
        wanted: What it held and asked for, as far as that is known.
        ceilings: The ceilings in force.
        elapsed: Seconds since the start of the trial.
        share: The share of the limit from which the limit is taken for the reason; 0 where it
            surely is.
        refused: Whether the reason says "asked for" instead of "used".
    """
    if resource not in ceilings:
        return None
    limit, quota = ceilings[resource]
    if wanted < share * limit:
        return None
    # What was refused is not known more closely than that it was over the limit.
    observed = max(wanted, limit * (1 + 1e-6) + 1)
    return Breach(resource, limit, observed, elapsed, quota=quota, refused=refused)


def _ratio(breach: Breach) -> float:
    return breach.observed / breach.limit if breach.limit > 0 else math.inf


# Share of what is left of a quota at which more is requested, so that the answer comes in time.
EXTENSION_THRESHOLD = 0.8
# The same of what is held at one moment: a promise is no slice, and most trials come near it
# without outgrowing it.
HELD_EXTENSION_THRESHOLD = 0.9
# Seconds that a breach of a slice waits for an answer. On a busy machine, or while a database
# server restarts, it comes late; where nobody answers at all, the trial must end.
EXTENSION_TIMEOUT = 10.0
# Seconds after which what was refused is asked for again: others may have given back theirs.
RETRY_INTERVAL = 0.2


def extension_threshold(resource: str) -> float:
    """Return the share of what was granted at which more is asked for."""
    return HELD_EXTENSION_THRESHOLD if resource in HELD_RESOURCES else EXTENSION_THRESHOLD


class QuotaExtension:
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
        near = {
            n
            for n, s in _slices(ceilings).items()
            if amounts.get(n, 0.0) >= extension_threshold(n) * s
        }
        is_due = over - self._refused or (near and now >= self._next)
        if is_due and self._asked is None:
            self._asked, self._is_due, self._over = now, True, over
            self.needs = {name: amounts.get(name, 0.0) for name in sorted(near | over)}
        return [breach for breach in breaches if not self._holds_back(breach, now)]

    def _holds_back(self, breach: Breach, now: float) -> bool:
        if not _can_grow(breach.resource, breach.quota) or breach.resource in self._refused:
            return False
        return self._asked is None or now - self._asked < EXTENSION_TIMEOUT

    def answer(self, before: Ceilings, after: Ceilings, now: float) -> None:
        """Take in new slices: what the trial was over and did not grow was refused."""
        old, new = _slices(before), _slices(after)
        grown = {name for name, amount in new.items() if amount > old.get(name, 0.0)}
        # Nothing at all is left for a trial that is to end at once.
        self._refused = {name for name, amount in new.items() if amount <= 0}
        self._refused |= self._over - grown
        self._over = set()
        self._asked = None
        self._next = now if self.needs.keys() <= grown else now + RETRY_INTERVAL

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
                    marks.append(started + EXTENSION_THRESHOLD * ceiling)
        marks = [mark for mark in marks if mark > now]
        if self._asked is not None:
            marks.append(max(now, self._asked + EXTENSION_TIMEOUT))
        return min(marks, default=None)


def _can_grow(resource: str, quota: bool) -> bool:
    # The study's clock runs for all its trials alike: nobody can give back any of it.
    return quota and resource != "wall_time"


def _slices(ceilings: Ceilings) -> dict[str, float]:
    return {n: ceiling for n, (ceiling, quota) in ceilings.items() if _can_grow(n, quota)}
