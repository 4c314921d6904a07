"""Asking by the protocol: write the claim, read all rows, decide, write the answer."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import random

from optuna_quota._ledger.accounts import Accounts
from optuna_quota._ledger.accounts import Snapshot
from optuna_quota._ledger.protocol import answered
from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import claimed
from optuna_quota._ledger.protocol import decide
from optuna_quota._ledger.protocol import Decision
from optuna_quota._ledger.protocol import Want
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._ledger.worker import this_worker


_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25


def pauses() -> Iterator[float]:
    """Yield seconds to wait between looks, longer and longer, never in step with others."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)


def ask(
    accounts: Accounts,
    trial_id: int,
    number: int,
    held: Reservation,
    wants: Mapping[str, Want],
    look: Callable[[], Snapshot],
    *,
    queue: bool,
) -> tuple[Decision, Snapshot]:
    """Return what a trial is granted, and the rows by which that was decided.

    A grant is left for the caller to write into the row.

    Args:
        accounts: The study's accounts.
        trial_id: The trial.
        number: Its number.
        held: What its row says now; the row says so again after a withdrawal.
        wants: What it wants.
        look: Reads the rows and buries the dead, whose claims nobody would answer for.
        queue: Whether it queues up behind those that wait.
    """
    if not wants:
        return Decision("grant"), look()
    asking = claimed(held, wants)
    accounts.write(trial_id, asking)
    written = accounts.clock.monotonic()
    for pause in pauses():
        seen = look()
        decision = judge(accounts, number, asking, wants, seen, queue=queue)
        if decision.action != "wait":
            break
        accounts.clock.sleep(pause)
        if accounts.clock.monotonic() - written > accounts.beat:
            accounts.write(trial_id, asking)
            written = accounts.clock.monotonic()
    if decision.action == "withdraw":
        accounts.write(trial_id, answered(asking, decision))
    return decision, seen


def judge(
    accounts: Accounts,
    number: int,
    held: Reservation,
    wants: Mapping[str, Want],
    seen: Snapshot,
    *,
    queue: bool,
) -> Decision:
    """Return what the protocol decides by what was seen; see :func:`ask`."""
    me = Claim(number, this_worker().machine, held.granted, held.asked, held.waits)
    return decide(me, wants, seen.claims, seen.used, accounts.ceilings, queue=queue)
