"""One trial of this process that runs under the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._metering import extension_threshold
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna_quota._metering import TrialMonitor


@dataclass
class Running:
    """One trial of this process that runs under the ledger.

    Attributes:
        trial_id: Its id in the storage.
        number: Its number.
        reservation: What its row says.
        limits: Its limits.
        deadline: Seconds from its start to the end of the study's clock time.
        thread: The thread whose ``optimize`` runs it; None when it was asked for by hand.
        asker: The thread that asked for it by hand; None under ``optimize``.
        watch: Its metering.
        start: When it began, pauses of this process counted.
    """

    trial_id: int
    number: int
    reservation: Reservation
    limits: Limits
    deadline: float | None = None
    thread: int | None = None
    asker: int | None = None
    watch: TrialMonitor | None = None
    start: float | None = None

    @property
    def began(self) -> float | None:
        """When it would have begun, had this process not been stopped since then."""
        if self.start is None or self.watch is None:
            return self.start
        return self.start + self.watch.paused

    @property
    def left(self) -> Mapping[str, float]:
        """What it may use in all, by resource."""
        granted = self.reservation.granted
        left = {k: v for k, v in granted.items() if k != "n_trials" and not k.startswith(DEVICE)}
        if self.deadline is not None:
            left["wall_time"] = self.deadline
        return left

    def low(self, usage: Usage | None, quota: Quota) -> dict[str, float]:
        """Return what it used of the resources that run low; of all, 0, if that is unknown."""
        granted = self.reservation.granted
        if usage is None:
            return dict.fromkeys(sorted(self.left.keys() & granted.keys()), 0.0)
        amounts = {name: usage.get(name) for name in granted}
        if "cost" in granted:
            amounts["cost"] = quota.price({name: usage.get(name) for name in quota.prices})
        known = ((name, amount) for name, amount in amounts.items() if amount is not None)
        return {n: amount for n, amount in known if amount >= extension_threshold(n) * granted[n]}
