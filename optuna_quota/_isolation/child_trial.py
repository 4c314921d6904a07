"""The trial as the objective sees it in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import datetime
from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING

from optuna.trial import Trial

from optuna_quota._isolation.calls import Calls
from optuna_quota._isolation.calls import Handle
from optuna_quota._isolation.calls import Proxy


if TYPE_CHECKING:
    from optuna_quota._resources import Breach


TRIAL = 0
# What `optuna_quota.check` asks a trial that is not in its study's process.
CHECK = "_quota_check"
# Asks for a reading of what the trial holds at this moment.
MEASURE = "_quota_measure"


@dataclass(frozen=True)
class TrialFacts:
    """What of a trial never changes, so that the child need not ask."""

    number: int
    trial_id: int | None
    datetime_start: datetime.datetime | None
    study: Handle | None


class ChildTrial(Trial):
    """An :class:`optuna.trial.Trial` whose every deed is done in the study's process.

    Args:
        calls: The way there.
        facts: What never changes.
    """

    def __init__(self, calls: Calls, facts: TrialFacts) -> None:
        # The base class's own would ask the sampler a second time: it is not called.
        self._calls = calls
        self._facts = facts
        self._trial_id = facts.trial_id  # type: ignore[assignment]  # None for a FixedTrial
        if facts.study is not None:
            self.study = Proxy(calls, facts.study)  # type: ignore[assignment]  # passes for one

    @property
    def number(self) -> int:
        """The trial's number."""
        return self._facts.number

    @property
    def datetime_start(self) -> datetime.datetime | None:
        """When the trial started."""
        return self._facts.datetime_start

    def _quota_check(self) -> Breach | None:
        breach: Breach | None = self._calls.call(TRIAL, CHECK)
        return breach

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_calls", "_facts"):
            raise AttributeError(name)
        return self._calls.read(TRIAL, name)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A running trial can't be sent to another process.")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__reduce__()


def _method(name: str) -> Callable[..., Any]:
    def forward(self: ChildTrial, *args: Any, **kwargs: Any) -> Any:
        return self._calls.call(TRIAL, name, *args, **kwargs)

    forward.__name__ = name
    forward.__doc__ = getattr(Trial, name).__doc__
    return forward


def _attribute(name: str) -> property:
    return property(lambda self: self._calls.read(TRIAL, name))


# Every public method and property of a trial, those of later versions of Optuna too.
for _name in dir(Trial):
    if not _name.startswith("_") and _name not in vars(ChildTrial):
        _is_method = callable(getattr(Trial, _name))
        setattr(ChildTrial, _name, _method(_name) if _is_method else _attribute(_name))
