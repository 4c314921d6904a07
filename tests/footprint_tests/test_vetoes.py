"""Refused points, counted from the rows."""

from __future__ import annotations

from typing import Any

from optuna.trial import create_trial
from optuna.trial import TrialState

from optuna_quota._footprint.vetoes import count_vetoes
from optuna_quota._footprint.vetoes import Vetoes


BREACH = {"resource": "memory", "limit": 1e9, "observed": 2e9, "seconds": 1.0}


def trial_with(action: Any, outcome: str, **attrs: Any) -> Any:
    state = TrialState.COMPLETE if outcome == "completed" else TrialState.PRUNED
    attrs = {f"quota:{name}": value for name, value in attrs.items()}
    return create_trial(
        state=state,
        value=1.0,
        user_attrs={"quota:proposed": action, "quota:outcome": outcome, **attrs},
    )


def test_audits_tell_the_rate_of_false_vetoes() -> None:
    trials = [
        trial_with({"action": "redrawn"}, "completed"),
        trial_with({"action": "moved"}, "completed"),
        trial_with({"action": "rejected"}, "rejected"),
        trial_with({"action": "audited"}, "completed"),
        *[trial_with({"action": "audited"}, "terminated", breach=BREACH) for _ in range(3)],
        trial_with({"action": "audited"}, "pruned"),
        trial_with({"action": 7}, "completed"),
        trial_with("junk", "completed"),
        create_trial(value=1.0),
    ]
    found = count_vetoes(trials)
    assert found == Vetoes(redrawn=1, moved=1, rejected=1, audited=4, wrong=1)
    assert str(found) == (
        "Points refused: 7 (1 redrawn, 1 moved, 1 rejected, 4 run to try the veto, 1 of them did "
        "fit (25% false vetoes))."
    )


def test_none_is_none() -> None:
    assert count_vetoes([]).total == 0
