"""Exceptions of the library.

::

    QuotaError
    ├── StudyRejected      the projected study does not fit its quota
    ├── QuotaExhausted     a total quota of the study is used up
    ├── TrialCrashed       an isolated trial's process died (also a RuntimeError)
    ├── TrialRejected      a trial was not admitted (also optuna.TrialPruned)
    └── LimitBreached      a trial was over a limit (also optuna.TrialPruned)
        └── TrialPreempted a trial has to end now and runs again later

Each carries ``.resource`` and the figures that were compared, as keyword arguments and as
attributes, and can be pickled.
"""

from __future__ import annotations

from typing import Any

from optuna.exceptions import TrialPruned


class QuotaError(Exception):
    """Base class of the library's exceptions.

    Example:

        .. code-block:: python

            try:
                study.optimize(objective, n_trials=200)
            except QuotaError as error:
                print(error.resource, error)

    Args:
        message: One or more sentences.
        resource: The resource that decided, such as ``"memory"``; None if no single one did.
        quota: The quota compared, in SI base units.
        limit: The limit compared, in SI base units.
        observed: What was used or projected, in SI base units.
    """

    def __init__(
        self,
        message: str = "",
        *,
        resource: str | None = None,
        quota: float | None = None,
        limit: float | None = None,
        observed: float | None = None,
        **figures: Any,
    ) -> None:
        super().__init__(message)
        self.resource = resource
        self.quota = quota
        self.limit = limit
        self.observed = observed
        for name, figure in figures.items():
            setattr(self, name, figure)

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call the class with `args` alone; the figures are its state.
        return (type(self), self.args, self.__dict__)


class StudyRejected(QuotaError):
    """Raised before anything runs when the projected study does not fit its quota.

    Example:

        .. code-block:: python

            try:
                study.optimize(objective, n_trials=200)
            except StudyRejected as error:
                print(error.projection.table)
                print(error.projection.nearest)

    Attributes:
        projection: The :class:`~optuna_quota.Projection` that decided.
    """

    projection: Any = None


class QuotaExhausted(QuotaError):
    """Raised by a further ``ask`` when a total quota of the study is used up.

    Also by one that would have to wait for trials which only its own thread can ``tell``.

    Example:

        .. code-block:: python

            try:
                trial = study.ask()
            except QuotaExhausted as error:
                print(f"no more {error.resource}")

    Attributes:
        temporary: Whether running trials hold what is left, so that another ``ask`` may succeed
            once one of them has ended.
    """

    temporary: bool = False


class TrialCrashed(QuotaError, RuntimeError):
    """Raised when the process of an isolated trial died without a result.

    Under ``optimize``, the trial fails and the next one starts instead, unless ``isolated`` has
    ``on_crash="raise"``, or the first three trials of the study or five in a row have crashed.

    Example:

        .. code-block:: python

            try:
                value = isolated(objective)(study.ask())
            except TrialCrashed as error:
                print(error.exitcode, error)

    Attributes:
        exitcode: The exit code of the process, negative for a signal, None when unknown.
    """

    exitcode: int | None = None


class TrialRejected(QuotaError, TrialPruned):
    """Raised inside a trial that was rejected; Optuna records it as pruned.

    Example:

        .. code-block:: python

            try:
                x = trial.suggest_float("x", 0, 1)
            except TrialRejected as error:
                print(error.resource, error.limit)
                raise
    """


class LimitBreached(QuotaError, TrialPruned):
    """Raised inside a trial that is over one of its limits; Optuna records it as pruned.

    Example:

        .. code-block:: python

            try:
                check(trial)
            except LimitBreached as error:
                save_checkpoint()
                print(error.resource, error.observed, error.limit)
                raise

    Attributes:
        seconds: Seconds from the start of the trial to the breach.
    """

    seconds: float | None = None


class TrialPreempted(LimitBreached):
    """Raised inside a trial that has to end now and is to run again later.

    It is over no limit. As a LimitBreached, it reaches what saves a checkpoint when that is
    raised. Optuna records the trial as failed.

    Example:

        .. code-block:: python

            try:
                check(trial)
            except TrialPreempted:
                save_checkpoint(trial.user_attrs["quota:checkpoint"])
                raise
    """
