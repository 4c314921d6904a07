"""``isolated``: run each trial of an objective in a child process that can be killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, get_args, TYPE_CHECKING

from optuna_quota._isolation.launch import IsolationOptions, OnCrash, StartMethod
from optuna_quota._isolation.run import TrialRun
from optuna_quota._limits import Limits
from optuna_quota._units import Duration, parse_seconds


if TYPE_CHECKING:
    from optuna.trial import BaseTrial


class Isolated:
    """An objective whose trials run in processes of their own; made by :func:`isolated`."""

    def __init__(self, objective: Callable[..., Any], options: IsolationOptions) -> None:
        functools.update_wrapper(self, objective, updated=())
        self.objective = objective
        self.options = options

    def __call__(self, trial: BaseTrial) -> Any:
        """Run the objective on a trial in a process of its own; return what it returns."""
        return TrialRun(lambda _: self.objective, self.options, trial).run()

    def __repr__(self) -> str:
        name = getattr(self.objective, "__qualname__", repr(self.objective))
        return f"isolated({name})"


def isolated(
    objective: Callable[..., Any],
    *,
    grace_period: Duration = 5.0,
    start_method: StartMethod = "forkserver",
    limits: Limits | None = None,
    predictive_stop: bool = False,
    on_crash: OnCrash = "fail",
    strict_memory: bool = False,
    preload: Sequence[str] = (),
) -> Isolated:
    """Run each trial of an objective in a child process that can be killed.

    The trial that the objective gets works as usual, and what the objective returns, raises,
    prints and logs arrives as if it had run in this process. In a trial over a limit,
    :class:`~optuna_quota.LimitBreached` is raised in the main thread, so that it can save a
    checkpoint; after the grace period it is killed, with all processes that it started. A trial
    whose process dies fails, and the study continues. After Ctrl-C, too, a trial has its grace
    period; a second Ctrl-C kills it. While this process is stopped (Ctrl-Z, SIGSTOP), so are its
    trials, and that time does not count.

    Example:

        .. code-block:: python

            study = optuna.create_study(
                pruner=QuotaPruner(MedianPruner(), limits=Limits(memory="4GiB", wall_time="5min"))
            )
            study.optimize(isolated(objective), n_trials=100)

    The script needs no ``if __name__ == "__main__":`` guard: a trial's process runs its imports
    and definitions only, and gets the global variables that the objective uses by value. With a
    guard, all code outside of it runs again, as under :mod:`multiprocessing`. Settings that the
    script has made in its modules, in numpy, torch and other libraries hold in its trials. What a
    trial changes stays in its process.

    A trial starts with the modules loaded that this process has imported. Its random generators
    (``random``, numpy, torch; those that the script has made, too) are seeded differently for each
    trial, and reproducibly in a script that seeds them. Threads, pools and processes that it
    leaves open end with it.

    Args:
        objective: A function, lambda, closure, bound method or any callable that takes a trial.
        grace_period: Seconds between the polite stop and the kill, or a duration such as "1min".
            Also the time for exit handlers once the objective has ended (1 to 5 s), and for a
            process that was stopped by SIGSTOP to be continued. A trial over its memory limit that
            continues to grow gets none. 0 kills at once.
        start_method: ``"forkserver"`` forks each trial from a server process that has loaded the
            modules (some milliseconds), ``"spawn"`` starts an interpreter for each (some hundred),
            ``"fork"`` forks this process, so that nothing needs to be pickled; it is refused once
            this process uses CUDA, and is unsafe with threads that hold locks. Locks and queues
            of :mod:`multiprocessing` can be passed in as to a ``Process`` of that method; an
            objective that refers to one of its fork context is forked in any case.
        limits: Limits on each trial, for where no :class:`~optuna_quota.QuotaPruner` can be
            passed; otherwise those of the study's pruner are in force.
        predictive_stop: Whether to stop a trial as soon as the growth of its memory, or its pace
            against the time limit, is certain to breach: see ``Breach.forecast``.
        on_crash: What ``optimize`` does when a trial's process dies of a signal, exits, or returns
            a value that can't be pickled: ``"fail"`` fails the trial and continues with the next
            one, ``"raise"`` raises :class:`~optuna_quota.TrialCrashed`. When the first three
            trials of a study, or five in a row, have crashed, it is raised in either case.
        strict_memory: Whether the kernel refuses an allocation that would pass the memory limit.
            Then a trial never passes it, but memory that is reserved and never touched counts as
            well (``np.zeros``, the stacks of threads). By default the memory in use is measured,
            and a trial is stopped once it passes the limit.
        preload: Names of modules to import before the first trial starts, in addition to those
            that this process has imported.

    Returns:
        A callable for ``study.optimize``, or to be called with a trial from ``study.ask``.

    Raises:
        ValueError: If ``grace_period`` is negative or not finite, or ``start_method`` or
            ``on_crash`` is unknown.
        TypeError: If the objective can't be called, ``limits`` is not a Limits, or ``preload``
            is not a sequence of module names.
        LimitBreached: By the call, when the trial was over a limit.
        TrialCrashed: By the call, when the trial's process died; within ``optimize`` as
            ``on_crash`` says.
    """
    if not callable(objective):
        raise TypeError(f"`objective` must be callable but got {objective!r}.")
    if isinstance(getattr(objective, "__dict__", {}).get("options"), IsolationOptions):
        raise TypeError(f"`objective` is isolated already: {objective!r}.")
    if start_method not in get_args(StartMethod):
        methods = ", ".join(get_args(StartMethod))
        raise ValueError(f"`start_method` must be one of {methods} but got {start_method!r}.")
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"`limits` must be Limits but got {limits!r}.")
    if on_crash not in get_args(OnCrash):
        raise ValueError(f"`on_crash` must be 'fail' or 'raise' but got {on_crash!r}.")
    if isinstance(preload, str) or not all(isinstance(name, str) for name in preload):
        raise TypeError(f"`preload` must be a sequence of module names but got {preload!r}.")
    options = IsolationOptions(
        grace_period=parse_seconds(grace_period, "grace_period", zero=True),
        start_method=start_method,
        limits=limits,
        predictive_stop=predictive_stop,
        on_crash=on_crash,
        strict_memory=strict_memory,
        preload=tuple(preload),
    )
    return Isolated(objective, options)
