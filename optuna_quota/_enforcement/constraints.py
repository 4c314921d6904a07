"""Limits as Optuna constraints, so that samplers learn the feasible region.

GPSampler and BoTorchSampler demand the same constraints of all completed trials of a study and
raise otherwise, while trials without any count as feasible for all samplers. A row can't be
changed once it is finished, and limits may be added, changed and removed while a study runs. So a
row that completed within its limits has no constraint of ours, like one of a study without limits,
and a sampler that demands the same of all gets a view of the trials with the limits in force now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import logging
import math
import statistics
from typing import Any, TYPE_CHECKING

from optuna.samplers import BaseSampler

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import find_nested
from optuna_quota._records import CONSTRAINED, PREFIX, read_constrained, read_record
from optuna_quota._resources import Breach, Limits


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial, FrozenTrial

    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.enforcement")

# The constraint of an unknown usage: neither within the limit nor over it.
NEUTRAL = 0.0


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
    return {
        name: observed[name] / limit - 1.0
        if math.isfinite(observed.get(name, math.nan))
        else NEUTRAL
        for name, limit in sorted(limits.amounts().items())
    }


def constraint_attributes(existing: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the system attributes that hold our constraints beside those of others.

    optuna-dashboard reads the list alone. Optuna calls its items "0", "1", and so on: where the
    user has set a constraint of such a key, ours get keys too.

    Args:
        existing: The row's system attributes.
        own: Our constraints by resource, sorted.
    """
    listed = existing.get(_optuna.CONSTRAINTS)
    theirs = listed if isinstance(listed, (list, tuple)) else ()
    values = [*(float(value) for value in theirs), *own.values()]
    if any(f"{_optuna.CONSTRAINTS}:{index}" in existing for index in range(len(values))):
        return {f"{_optuna.CONSTRAINTS}:{PREFIX}{name}": value for name, value in own.items()}
    return {_optuna.CONSTRAINTS: values, CONSTRAINED: list(own)}


def uniform_constraints(trials: Sequence[FrozenTrial], limits: Limits) -> list[dict[str, float]]:
    """Return constraints with the same keys in the same order for each trial.

    First those that the user set on any of the trials; one that a trial does not have is neutral.
    Then one for each limit that is in force now, whatever was in force when the trial ran. A usage
    that is unknown counts as the median of those known, but not as a breach, so that it does not
    bend a model's fit to the others.

    Args:
        trials: Completed trials.
        limits: The limits in force.
    """
    theirs = [_user_constraints(trial) for trial in trials]
    names = list(dict.fromkeys(name for each in theirs for name in each))
    ours = [_observed_constraints(trial, limits) for trial in trials]
    fill = {name: _typical(each.get(name) for each in ours) for name in sorted(limits.amounts())}
    return [
        {
            **{name: user.get(name, NEUTRAL) for name in names},
            **{f"{PREFIX}{name}": own.get(name, value) for name, value in fill.items()},
        }
        for user, own in zip(theirs, ours, strict=True)
    ]


def _user_constraints(trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's constraints without those that stand for limits."""
    constraints = _optuna.constraints_of(trial)
    found = {k: v for k, v in constraints.items() if not k.startswith(PREFIX)}
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


def _typical(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return min(NEUTRAL, statistics.median(known)) if known else NEUTRAL


class TolerantConstraintsFunc:
    """A sampler's ``constraints_func`` that may fail for trials that were stopped early.

    Optuna calls it for each pruned trial too, and an error ends the study; most functions read
    what the objective sets at its end. QuotaSampler catches the error itself; without it, the
    sampler gets this function instead.

    Args:
        function: The user's.

    Attributes:
        stopped: Numbers of the trials for which it may fail.
    """

    def __init__(self, function: Callable[[FrozenTrial], Sequence[float]]) -> None:
        self.function = function
        self.stopped: set[int] = set()
        self._has_warned = False

    def __call__(self, trial: FrozenTrial) -> Sequence[float]:
        """Return the constraints of a trial, none where the function fails and may."""
        try:
            return self.function(trial)
        except Exception as error:
            if trial.number not in self.stopped:
                raise
            if not self._has_warned:
                self._has_warned = True
                _logger.warning(constraints_warning(trial.number, error))
            return ()
        finally:
            self.stopped.discard(trial.number)


def tolerate_constraints_failure(
    study: Study, trial: BaseTrial | FrozenTrial, monitor: TrialMonitor
) -> None:
    """Let ``constraints_func`` of the study's sampler fail for a trial that is being stopped."""
    if monitor.owner == "sampler":
        return
    samplers: list[Any] = find_nested(_optuna.unwrap_study(study).sampler, BaseSampler)
    for sampler in samplers:
        for function in _optuna.replace_constraints_func(sampler, _tolerant):
            function.stopped.add(trial.number)


def constraints_warning(number: int, error: Exception) -> str:
    """Return the one warning about trials whose constraints are unknown."""
    return (
        f"`constraints_func` failed for trial {number}, which did not complete: {error!r}. The "
        "trial gets no constraints from it; further failures of this kind are not reported."
    )


def _tolerant(function: Any) -> TolerantConstraintsFunc:
    already = isinstance(function, TolerantConstraintsFunc)
    return function if already else TolerantConstraintsFunc(function)
