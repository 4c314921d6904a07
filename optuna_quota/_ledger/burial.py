"""Finishes the rows of workers that are gone; what they used is not forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import logging
import os

from optuna_quota._ledger.leases import Death
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.rows import Rows
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Usage


_logger = logging.getLogger("optuna.quota.ledger")


def bury(rows: Rows, deaths: Sequence[Death], now: float) -> list[int]:
    """Finish the rows of workers that are gone; return the ids of those that this call finished.

    Args:
        rows: The study's rows.
        deaths: Which, and why.
        now: Seconds since the epoch on this machine's clock.
    """
    finished = []
    for death in deaths:
        entry = death.entry
        held = entry.reservation or Reservation(trial_id=entry.trial_id)
        charged = replace(held, asked={}, waits={}, charged=charges_of(death, now))
        host = held.worker.host if held.worker is not None else None
        record = TrialRecord(_last_known(held), "failed", death.reason, host=host)
        # Another worker may be faster, or this one comes back and finishes it.
        if rows.fail(entry.trial_id, record, charged):
            _logger.warning(f"Trial {entry.number} was failed: {death.reason}")
            finished.append(entry.trial_id)
    return finished


def _last_known(held: Reservation) -> Usage:
    names = ("memory", "wall_time", "cpu_time", "gpu_memory", "gpu_time", "energy")
    return Usage(*(held.used.get(name) for name in names))


def charges_of(death: Death, now: float) -> dict[str, float]:
    """Return the most that a trial can have used whose worker is gone, by resource.

    It was metered and ended at what it was granted, so it is charged no more than that. Time
    bounds it further: until now where its worker's clock is this machine's, else from the last
    that was heard of it for as long as nothing was.
    """
    held = death.entry.reservation
    if held is None or held.began is None:
        return {}
    before = held.used.get("wall_time", 0.0)
    elapsed = max(before, now - held.began) if death.here else before + death.silent
    charges = {"trial_time": min(elapsed, held.granted.get("trial_time", elapsed))}
    if death.here and "cpu_time" in held.granted:
        most = held.used.get("cpu_time", 0.0) + (os.cpu_count() or 1) * (elapsed - before)
        charges["cpu_time"] = min(most, held.granted["cpu_time"])
    for name in ("cpu_time", "gpu_time", "energy"):
        charges.setdefault(name, held.granted.get(name, held.used.get(name, -1.0)))
    return {name: amount for name, amount in charges.items() if amount >= 0}
