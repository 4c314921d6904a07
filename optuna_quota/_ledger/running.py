"""One trial of this process that runs under the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota
from optuna_quota._resources import Usage


if TYPE_CHECKING:
    from optuna_quota._metering import Watch


# A running trial asks for its next slice when this share of what it has is used.
EXTEND_AT = 0.8


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
    """

    trial_id: int
    number: int
    reservation: Reservation
    limits: Limits
    deadline: float | None = None
    thread: int | None = None
    asker: int | None = None
    watch: Watch | None = None

    @property
    def left(self) -> Mapping[str, float]:
        """What it may use in all, by resource."""
        granted = self.reservation.granted
        left = {k: v for k, v in granted.items() if k != "n_trials" and not k.startswith(DEVICE)}
        if self.deadline is not None:
            left["wall_time"] = self.deadline
        return left

    def low(self, usage: Usage | None, quota: Quota) -> list[str]:
        """Return of which resources it has used most of what it was granted; all if unknown."""
        granted = self.reservation.granted
        if usage is None:
            return sorted(self.left.keys() & granted.keys())
        amounts = {name: usage.get(name) for name in granted}
        if "cost" in granted:
            amounts["cost"] = quota.price({name: usage.get(name) for name in quota.prices})
        known = ((name, amount) for name, amount in amounts.items() if amount is not None)
        return sorted(name for name, amount in known if amount >= EXTEND_AT * granted[name])
