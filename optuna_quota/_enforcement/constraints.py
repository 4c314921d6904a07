"""Limits as Optuna constraints, so that samplers learn the feasible region: pure.

GPSampler and BoTorchSampler demand the same constraints of all completed trials of a study and
raise otherwise, while trials without any count as feasible for all samplers. A row can't be
changed once it is finished, and limits come, change and go in mid-study. So a row that completed
within its limits has no constraint of ours, like one of a study without limits; and a sampler that
demands the same of all gets a view of the trials, with the limits in force now.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import logging
import math
import statistics
from typing import Any
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import find_nested
from optuna_quota._records import PREFIX
from optuna_quota._records import read_constrained
from optuna_quota._records import read_record
from optuna_quota._resources import Breach
from optuna_quota._resources import Limits


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

    from optuna_quota._metering import TrialMonitor


# What an unknown usage says: neither within the limit nor over it.
NEUTRAL = 0.0
# Begins the keys of constraints that stand for limits, where they have keys.
OWN_KEY = PREFIX


def limit_constraints(
    limits: Limits, amounts: Mapping[str, float], breach: Breach | None = None
) -> dict[str, float]:
    """Return observed / limit - 1 for each limited resource, sorted by the resource's name.

    Args:
        limits: The limits on the trial, not what was left of a quota.
        amounts: What it used, by resource, in SI base units; what is missing is neutral.
        breach: What it was stopped for; a forecast counts as observed.
    """
    observed = dict(amounts)
    if breach is not None and not breach.quota:
        observed[breach.resource] = max(breach.observed, observed.get(breach.resource, 0.0))
    ceilings = sorted(limits.amounts().items())
    return {name: _ratio(observed.get(name), limit) for name, limit in ceilings}


def uniform_constraints(trials: Sequence[FrozenTrial], limits: Limits) -> list[dict[str, float]]:
    """Return constraints with the same keys in the same order for each trial.

    First those that the user set on any of the trials; one that a trial does not have is neutral.
    Then one for each limit that is in force now, whatever was in force when the trial ran. A usage
    that is unknown is taken for the median of those known, but for no breach: it must not bend
    what a model makes of the others.

    Args:
        trials: Completed trials.
        limits: The limits in force.
    """
    theirs = [_user_constraints(trial) for trial in trials]
    names = list(dict.fromkeys(name for each in theirs for name in each))
    ours = [_observed_constraints(trial, limits) for trial in trials]
    fill = {name: _middle(each.get(name) for each in ours) for name in sorted(limits.amounts())}
    return [
        {
            **{name: user.get(name, NEUTRAL) for name in names},
            **{f"{OWN_KEY}{name}": own.get(name, value) for name, value in fill.items()},
        }
        for user, own in zip(theirs, ours, strict=True)
    ]


def _user_constraints(trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's constraints without those that stand for limits."""
    constraints = _optuna.constraints_of(trial)
    found = {k: v for k, v in constraints.items() if not k.startswith(OWN_KEY)}
    # Those of limits are the last ones of the list, whose items are called "0", "1", and so on.
    n_own = len(read_constrained(trial))
    n_list = len(trial.system_attrs.get(_optuna.CONSTRAINTS) or ())
    listed = {str(index) for index in range(n_list - n_own, n_list)}
    return {name: value for name, value in found.items() if name not in listed}


def _observed_constraints(trial: FrozenTrial, limits: Limits) -> dict[str, float]:
    record = read_record(trial)
    amounts = record.usage.amounts()
    known = Limits.from_amounts({n: v for n, v in limits.amounts().items() if n in amounts})
    return limit_constraints(known, amounts, record.breach)


def _middle(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return min(NEUTRAL, statistics.median(known)) if known else NEUTRAL


def joined_constraints(existing: Any, own: Iterable[float]) -> list[float]:
    """Return a base sampler's list of constraints, if it wrote one, followed by our own."""
    theirs = existing if isinstance(existing, (list, tuple)) else ()
    return [*(float(value) for value in theirs), *own]


def clashes(n_constraints: int, attributes: Mapping[str, Any], prefix: str) -> bool:
    """Return whether a key that the user set names an item of a list of constraints.

    Optuna calls the items of the list "0", "1", and so on.
    """
    return any(f"{prefix}:{index}" in attributes for index in range(n_constraints))


def _ratio(observed: float | None, limit: float) -> float:
    if observed is None or not math.isfinite(observed):
        return NEUTRAL
    return observed / limit - 1.0


_logger = logging.getLogger("optuna.quota.enforcement")


class TolerantConstraintsFunc:
    """A user's ``constraints_func``, which may fail for the trials in ``excused``.

    Args:
        function: The user's.
    """

    def __init__(self, function: Callable[[FrozenTrial], Sequence[float]]) -> None:
        self.function = function
        self.excused: set[int] = set()
        self._told = False

    def __call__(self, trial: FrozenTrial) -> Sequence[float]:
        """Return the constraints of a trial; none where the function fails and may."""
        try:
            return self.function(trial)
        except Exception as error:
            if trial.number not in self.excused:
                raise
            if not self._told:
                self._told = True
                _logger.warning(constraints_warning(trial.number, error))
            return ()
        finally:
            self.excused.discard(trial.number)


def tolerate_constraints_failure(
    study: Study, trial: BaseTrial | FrozenTrial, watch: TrialMonitor
) -> None:
    """Let the constraints of a trial that is being stopped remain unknown."""
    if watch.owner == "sampler":
        # QuotaSampler sees to it.
        return
    samplers: list[Any] = find_nested(_optuna.unwrap_study(study).sampler, BaseSampler)
    for sampler in samplers:
        for function in _optuna.replace_constraints_func(sampler, _excusing):
            function.excused.add(trial.number)


def constraints_warning(number: int, error: Exception) -> str:
    """Return what is said once of trials whose constraints are unknown."""
    return (
        f"`constraints_func` failed for trial {number}, which did not complete: {error!r}. The "
        "trial gets no constraints from it; further failures of this kind are not reported."
    )


def _excusing(function: Any) -> TolerantConstraintsFunc:
    return (
        function
        if isinstance(function, TolerantConstraintsFunc)
        else TolerantConstraintsFunc(function)
    )
