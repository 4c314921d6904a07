"""Lets a sampler's ``constraints_func`` fail for trials that were stopped before they were done.

Optuna asks it about each pruned trial too, and a failure ends the study. Most read what the
objective sets at its end. QuotaSampler catches the failure itself; without it, a sampler has to
be given another function.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import logging
from typing import Any
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler

from optuna_quota import _optuna
from optuna_quota._enforcement.nesting import find_inside


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.settle")


class ExcusingConstraints:
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


def excuse_constraints(study: Study, trial: BaseTrial | FrozenTrial, watch: TrialMonitor) -> None:
    """Let the constraints of a trial that is being stopped remain unknown."""
    if watch.owner == "sampler":
        # QuotaSampler sees to it.
        return
    samplers: list[Any] = find_inside(_optuna.whole_study(study).sampler, BaseSampler)
    for sampler in samplers:
        for function in _optuna.replace_constraints_func(sampler, _excusing):
            function.excused.add(trial.number)


def constraints_warning(number: int, error: Exception) -> str:
    """Return what is said once of trials whose constraints are unknown."""
    return (
        f"`constraints_func` failed for trial {number}, which did not complete: {error!r}. The "
        "trial gets no constraints from it; further failures of this kind are not reported."
    )


def _excusing(function: Any) -> ExcusingConstraints:
    return function if isinstance(function, ExcusingConstraints) else ExcusingConstraints(function)
