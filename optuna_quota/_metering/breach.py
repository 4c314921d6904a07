"""Decides whether usage breaches a limit, and whether a breach waits for a larger grant. No I/O.

:func:`is_breach` is the rule for one trial, :func:`quota_bound` that for sums over trials.

A trial that exceeds its grant requests more, and is terminated only if a request that it made
since then is refused: other trials may have released some after an earlier refusal. Until then,
its own limit and the whole quota bound it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from typing import NamedTuple

from optuna_quota._resources import CLOCK_RESOURCES, get_resource, HELD_RESOURCES
from optuna_quota._usage import Breach


# A trial breaches `cpu_cores` only beyond this factor: the rate of two busy threads is measured as
# 1.98 to 2.03 cores, due to clock ticks and the loop's own time.
CORES_SLACK = 1.05

# A failure this close to a limit counts as a failure at the limit: allocations are rounded up, and
# how much native code requested is unknown when it ends the process instead of raising.
AT_LIMIT = 0.95


class Ceiling(NamedTuple):
    """The most that a trial may use of one resource, in SI base units.

    ``quota`` is True for the rest of a quota of the study, False for a limit of the trial.
    """

    limit: float
    quota: bool = False


# Plain tuples ``(limit, quota)`` are accepted as well.
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


def quota_bound(quota: float) -> float:
    """Return the largest sum over trials that does not exceed a quota.

    It is the quota and a rounding error: 200 times 0.1 s fit in 20 s.
    """
    return quota * (1 + 1e-9)


def find_breaches(
    amounts: Mapping[str, float | None],
    ceilings: Ceilings,
    elapsed: float,
    *,
    forecast: bool = False,
) -> list[Breach]:
    """Return all breaches after ``elapsed`` seconds, the furthest over its limit first.

    An unknown amount (missing or None) breaches nothing. ``forecast`` has amounts that the trial
    is heading for.
    """
    found = [
        Breach(name, limit, amount, elapsed, quota=quota, forecast=forecast)
        for name, (limit, quota) in ceilings.items()
        if (amount := amounts.get(name)) is not None and is_breach(name, amount, limit)
    ]
    return sorted(found, key=lambda b: b.observed / b.limit if b.limit else math.inf, reverse=True)


def find_refused_breach(
    resource: str,
    wanted: float,
    ceilings: Ceilings,
    elapsed: float,
    *,
    share: float = AT_LIMIT,
    refused: bool = True,
) -> Breach | None:
    """Return the breach of a trial whose allocation failed, None if it was not near its limit.

    ``wanted`` is what it held and requested, as far as known. From this ``share`` of the limit on,
    the limit was the reason; 0 if that is certain. With ``refused``, the breach says "asked for"
    instead of "used".
    """
    if resource not in ceilings:
        return None
    limit, quota = ceilings[resource]
    if wanted < share * limit:
        return None
    # The size is unknown, except that it was over the limit.
    observed = wanted if is_breach(resource, wanted, limit) else limit * (1 + 1e-6) + 1
    return Breach(resource, limit, observed, elapsed, quota=quota, refused=refused)


# Share of a grant at which more is requested, so that the answer comes in time.
EXTENSION_THRESHOLD = 0.8
# The same for memory and other resources held at one moment: most trials come near their grant
# without exceeding it.
HELD_EXTENSION_THRESHOLD = 0.9
# Seconds that a breach waits for an answer, which is late on a busy machine and while a database
# server restarts; without an answer the trial is terminated.
EXTENSION_TIMEOUT = 10.0
# Seconds after which a refused request is repeated: others may have released some.
RETRY_INTERVAL = 0.2


def extension_threshold(resource: str) -> float:
    return HELD_EXTENSION_THRESHOLD if resource in HELD_RESOURCES else EXTENSION_THRESHOLD


class QuotaExtension:
    """The requests of one trial for more of the study's quotas; answers go to :meth:`resolve`."""

    def __init__(self, request: Callable[[], None]) -> None:
        # What was used of the requested resources at the time of the request.
        self.needs: Mapping[str, float] = {}
        self._request = request
        self._is_due = False
        self._requested_at: float | None = None
        self._over: set[str] = set()
        self._not_before = 0.0
        self._refused: set[str] = set()

    def review(
        self,
        breaches: Sequence[Breach],
        amounts: Mapping[str, float],
        ceilings: Ceilings,
        now: float,
    ) -> list[Breach]:
        """Return the breaches that don't wait for an answer; request more where it runs low."""
        granted = _granted(ceilings)
        over = {b.resource for b in breaches if _is_extensible(b.resource, b.quota)}
        low = {n for n in granted if amounts.get(n, 0.0) >= extension_threshold(n) * granted[n]}
        is_due = over - self._refused or (low and now >= self._not_before)
        if is_due and self._requested_at is None:
            self._requested_at, self._is_due, self._over = now, True, over
            self.needs = {name: amounts.get(name, 0.0) for name in sorted(low | over)}
        return [breach for breach in breaches if not self._must_wait(breach, now)]

    def _must_wait(self, breach: Breach, now: float) -> bool:
        if not _is_extensible(breach.resource, breach.quota) or breach.resource in self._refused:
            return False
        return self._requested_at is None or now - self._requested_at < EXTENSION_TIMEOUT

    def resolve(self, before: Ceilings, after: Ceilings, now: float) -> None:
        """Set new ceilings in answer: a ceiling that was exceeded and not raised is a refusal."""
        old, new = _granted(before), _granted(after)
        grown = {name for name, amount in new.items() if amount > old.get(name, 0.0)}
        # A trial that must end at once gets 0.
        self._refused = {name for name, amount in new.items() if amount <= 0}
        self._refused |= self._over - grown
        self._over = set()
        self._requested_at = None
        self._not_before = now if self.needs.keys() <= grown else now + RETRY_INTERVAL

    def take_request(self) -> Callable[[], None] | None:
        """Return the function that requests more if a request is due, else None."""
        is_due, self._is_due = self._is_due, False
        return self._request if is_due else None

    def deadline(self, started: float, ceilings: Ceilings, now: float) -> float:
        """Return when time alone calls for a review of a trial; infinite for never."""
        times = []
        for name in ceilings.keys() & set(CLOCK_RESOURCES):
            limit, quota = ceilings[name]
            times.append(started + limit)
            if _is_extensible(name, quota):
                times.append(started + EXTENSION_THRESHOLD * limit)
        times = [time for time in times if time > now]
        if self._requested_at is not None:
            times.append(max(now, self._requested_at + EXTENSION_TIMEOUT))
        return min(times, default=math.inf)


def _is_extensible(resource: str, quota: bool) -> bool:
    # All running trials share the study's wall time: none can release any of it.
    return quota and resource != "wall_time"


def _granted(ceilings: Ceilings) -> dict[str, float]:
    return {n: limit for n, (limit, quota) in ceilings.items() if _is_extensible(n, quota)}
