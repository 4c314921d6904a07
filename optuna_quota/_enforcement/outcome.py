"""How a trial ended, in one word and one sentence: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_quota._optuna import Told
from optuna_quota._resources import Breach
from optuna_quota._resources import Outcome
from optuna_quota._resources import RESOURCES
from optuna_quota.exceptions import LimitBreached


if TYPE_CHECKING:
    from optuna_quota._metering import Verdict


WENT_ON = "The objective was told to stop but returned a value."


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
    told: Told | None = None,
) -> Conclusion:
    """Return how a trial ended.

    A trial that was stopped for a breach is ``terminated``, whatever its objective made of it,
    but for one: where it caught the stop and returned a value, Optuna has a completed trial.

    Args:
        state: The state that Optuna is about to store.
        verdict: What whoever stopped it says.
        breach: What the meters saw; a trial may have ended before anything could act on it.
        error: What the objective raised, where that is known.
        told: What ``tell`` was called with, where that is known.
    """
    stop = None if verdict is None else (verdict.outcome, verdict.reason)
    if verdict is None and isinstance(error, LimitBreached):
        breach = breach or _breach_in(error)
        if breach is not None:
            stop = ("terminated", breach.reason)
    if verdict is not None and verdict.breach is not None:
        breach = verdict.breach
    if state == TrialState.COMPLETE:
        return Conclusion("completed", _why_completed(stop, breach), breach)
    end = _end(state, error, told)
    if stop is None:
        return Conclusion("pruned" if state == TrialState.PRUNED else "failed", end, breach)
    outcome, reason = stop
    if state == TrialState.FAIL and outcome in ("terminated", "rejected", "pruned"):
        # The objective was told to stop, and ended in its own way.
        reason = f"{reason} {end}"
        outcome = "failed" if outcome == "pruned" else outcome
    return Conclusion(outcome, reason, breach)


def _breach_in(error: LimitBreached) -> Breach | None:
    """Return the breach whose figures an error carries, None for one without any."""
    name, limit, observed = error.resource, error.limit, error.observed
    if name is None or name not in RESOURCES or limit is None or observed is None:
        return None
    return Breach(name, limit, observed, error.seconds or 0.0)


def _why_completed(stop: tuple[Outcome, str] | None, breach: Breach | None) -> str | None:
    if stop is not None and stop[0] in ("terminated", "rejected"):
        return f"{stop[1]} {WENT_ON}"
    if breach is None:
        return None
    return f"{breach.reason} The objective completed before it could be stopped."


def _end(state: TrialState, error: BaseException | None, told: Told | None) -> str:
    by_user = told is not None and told.by_user
    if by_user and told is not None and told.state == state:
        return f"Ended by study.tell(state={state.name})."
    if state == TrialState.PRUNED:
        return _said("The objective pruned itself", error)
    if error is not None:
        return f"The objective raised {_described(error)}."
    who = "study.tell was given" if by_user else "The objective returned"
    problem = "" if told is None or told.problem is None else f": {told.problem.rstrip('.')}"
    return f"{who} no valid value{problem}."


def _said(what: str, error: BaseException | None) -> str:
    return f"{what}: {error}" if error is not None and str(error) else f"{what}."


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:300]}…"
    return f"{type(error).__name__}: {shown}".removesuffix(".") if shown else type(error).__name__
