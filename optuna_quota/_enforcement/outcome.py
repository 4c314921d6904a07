"""How a trial ended, in one word and one sentence: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_quota._resources import Breach
from optuna_quota._resources import Outcome
from optuna_quota._resources import RESOURCES
from optuna_quota.exceptions import LimitBreached


if TYPE_CHECKING:
    from optuna_quota._metering import Verdict


@dataclass(frozen=True)
class Conclusion:
    """How a trial ended.

    Attributes:
        outcome: The word for it.
        reason: One sentence for a person; None for a trial that completed within its limits.
        breach: The limit it was over.
    """

    outcome: Outcome
    reason: str | None
    breach: Breach | None = None


def conclude(
    state: TrialState,
    verdict: Verdict | None = None,
    breach: Breach | None = None,
    error: BaseException | None = None,
) -> Conclusion:
    """Return how a trial ended.

    Args:
        state: The state that Optuna is about to store.
        verdict: What whoever stopped it says.
        breach: What the meters saw; a trial may have ended before anything could act on it.
        error: What the objective raised, where that is known.
    """
    if state == TrialState.COMPLETE:
        return Conclusion("completed", _completed_over(breach), breach)
    if verdict is not None:
        return Conclusion(verdict.outcome, verdict.reason, verdict.breach or breach)
    if isinstance(error, LimitBreached):
        breach = breach or _breach_in(error)
        if breach is not None:
            return Conclusion("terminated", breach.reason, breach)
    if state == TrialState.PRUNED:
        return Conclusion("pruned", _said("The objective pruned itself", error), breach)
    if error is None:
        return Conclusion("failed", "The objective returned no valid value.", breach)
    return Conclusion("failed", f"The objective raised {_described(error)}.", breach)


def _breach_in(error: LimitBreached) -> Breach | None:
    """Return the breach whose figures an error carries, None for one without any."""
    name, limit, observed = error.resource, error.limit, error.observed
    if name is None or name not in RESOURCES or limit is None or observed is None:
        return None
    return Breach(name, limit, observed, error.seconds or 0.0)


def _completed_over(breach: Breach | None) -> str | None:
    if breach is None:
        return None
    return f"{breach.reason} The objective completed before it could be stopped."


def _said(what: str, error: BaseException | None) -> str:
    return f"{what}: {error}" if error is not None and str(error) else f"{what}."


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:300]}…"
    return f"{type(error).__name__}: {shown}".removesuffix(".") if shown else type(error).__name__
