"""Which of many trials a model is fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optuna_quota._footprint.rows import FootprintRow


# The cost of a fit grows with the cube of the points; beyond this many more bring little.
CAP = 100
_RECENT = 40


def chosen(rows: Sequence[FootprintRow], cap: int = CAP) -> list[int]:
    """Return the indices of at most ``cap`` rows, oldest first.

    The newest say where the study is now; the others are spread evenly over the amounts of each
    resource, so that the cheapest and the dearest, stopped ones among them, are kept.
    """
    if len(rows) <= cap:
        return list(range(len(rows)))
    newest = min(_RECENT, cap // 2)
    recent, older = range(len(rows) - newest, len(rows)), rows[: len(rows) - newest]
    names = sorted({name for row in older for name in row.usage.amounts()})
    kept = set(recent)
    for name in names:
        amounts = np.array([_amount(row, name) for row in older])
        order = np.argsort(amounts, kind="stable")[: int(np.sum(np.isfinite(amounts)))]
        share = (cap - newest) // len(names)
        if len(order):
            ranks = np.linspace(0, len(order) - 1, share).round().astype(int)
            kept.update(order[ranks].tolist())
    return sorted(kept)


def _amount(row: FootprintRow, name: str) -> float:
    amount = row.usage.get(name)
    return np.inf if amount is None else amount
