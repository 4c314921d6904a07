"""A trial that waits for others which the waiting thread itself asked for (pure)."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterable

from optuna_quota._ledger.protocol import Claim
from optuna_quota._ledger.protocol import Shortage
from optuna_quota._resources import RESOURCES


# Seconds of waiting after which it is said.
PATIENCE = 10.0


def standstill(
    number: int, shortage: Shortage | None, claims: Iterable[Claim], own: Collection[int]
) -> str | None:
    """Return a warning when a trial may wait for ever, None when others may make room.

    Args:
        number: The trial that waits.
        shortage: What it waits for.
        claims: All running trials.
        own: Those that the waiting thread asked for by hand.
    """
    others = {claim.number for claim in claims} - {number}
    if not others or not others <= set(own):
        return None
    resource = None if shortage is None else RESOURCES.get(shortage.resource)
    what = "what it needs" if resource is None else resource.title
    listed = ", ".join(str(other) for other in sorted(others))
    held_by = f"trial {listed} holds" if len(others) == 1 else f"trials {listed} hold"
    return (
        f"Trial {number} waits for {what} that {held_by}. The same thread asked for all of them: "
        "if it is this thread that tells them, it waits for ever. Ask for fewer at once, or give "
        "a larger quota."
    )
