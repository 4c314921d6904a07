"""What is said of trials that no ledger admitted (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import TOTAL_RESOURCES


def describe_earlier(earlier: Mapping[str, float]) -> str | None:
    """Return a sentence on trials that ran before there was a quota, and on rows that were added.

    Args:
        earlier: What they come to; see :attr:`~optuna_quota._ledger.book.Book.earlier`.
    """
    ran, added = int(earlier.get("n_trials", 0)), int(earlier.get("added", 0))
    if not ran and not added:
        return None
    amounts = [
        f"{format_amount(name, earlier[name])} of {get_resource(name).title}"
        for name in TOTAL_RESOURCES
        if name != "n_trials" and earlier.get(name)
    ]
    return (
        f"Trials that this quota did not admit count with what their rows show ({ran} ran, "
        f"{added} {'was' if added == 1 else 'were'} added): "
        f"{', '.join(amounts) or 'no usage'}."
    )
