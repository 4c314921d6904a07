"""Stop trials in this process that exceed a limit: QuotaPruner, ``check`` and a signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import inspect
import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement import nesting
from optuna_quota._enforcement.active_trials import start_monitor
from optuna_quota._enforcement.preemption import find_preemption, preemption_of
from optuna_quota._enforcement.study_warnings import raise_if_never_fits, warn_of_ceilings
from optuna_quota._enforcement.trial_result import (
    build_record,
    save_record,
    tolerate_constraints_failure,
)
from optuna_quota._limits import Limits
from optuna_quota._metering import check_names, key_of, Meter, metering_loop, TrialMonitor, Verdict
from optuna_quota._records import is_rejected, parse_record, TrialRecord
from optuna_quota._units import check_flags
from optuna_quota._usage import Breach, breach_error
from optuna_quota.exceptions import LimitBreached, QuotaError, TrialRejected


_logger = logging.getLogger("optuna.quota.interrupt")

_OWNER = "pruner"
# Writing records takes at most a twentieth of a trial's time; one takes milliseconds on disk.
_SHARE = 20
# Memory that has grown by this factor since the last record is recorded at once.
_GROWTH = 1.1
# Seconds until the next attempt to interrupt when the signal came while Optuna's own code ran.
_RETRY_AFTER = 0.005


def record_usage(study: Study, trial: FrozenTrial, monitor: TrialMonitor, *, ends: bool) -> None:
    """Record the usage of a running trial if that is due, and its end if it is pruned now.

    A pruner is not called when a trial ends, so its row keeps the last record.
    """
    if monitor.recorded:
        return
    memory, due = monitor.last_record
    usage, started = monitor.usage(), time.perf_counter()
    if ends:
        monitor.recorded = True
        record = build_record(monitor, usage, TrialState.PRUNED)
    elif (usage.memory or 0.0) > memory * _GROWTH or started >= due:
        record = TrialRecord(usage=usage, isolation=monitor.isolation)
    else:
        return
    save_record(study, trial, record)
    now = time.perf_counter()
    monitor.last_record = usage.memory or 0.0, now + _SHARE * (now - started)


class QuotaPruner(_optuna.StudyPart, BasePruner):
    """Prunes a trial that is over one of its limits, and otherwise as another pruner does.

    A breach prunes at the next ``trial.should_prune()``, whatever was reported. That is a
    cooperative stop: only :func:`~optuna_quota.isolated` stops a trial that does not check.

    Example:

        .. code-block:: python

            pruner = QuotaPruner(MedianPruner(), limits=Limits(memory="4GiB", wall_time="5min"))
            study = optuna.create_study(pruner=pruner)

    It may be nested in another pruner, such as :class:`~optuna.pruners.PatientPruner`: a breach
    ends the trial even if the other one would let it go on. For this, the study's pruner is
    wrapped in a QuotaPruner with the same limits: by QuotaSampler and by ``isolated`` before the
    first trial, else after it.

    Without :class:`~optuna_quota.QuotaSampler`, a trial is measured from its first
    ``should_prune()`` on, and its usage at each of these calls is recorded.

    Args:
        base_pruner: Any pruner, Hyperband included; None to prune for breaches alone.
        limits: Ceilings on each trial; none by default, so that it is only held to the quota.
        interrupt: Whether to interrupt a trial that is over a limit and does not check, by raising
            :class:`~optuna_quota.LimitBreached` inside the objective. Best effort: it reaches
            trials in the main thread under ``optimize``, between two bytecodes, so never inside
            a running call into C, and an objective that catches everything swallows it.
        meters: Meters of your own, by whose names ``Limits(custom=...)`` limits.

    Raises:
        TypeError: If ``base_pruner`` is no pruner or ``limits`` are no :class:`Limits`.
    """

    def __new__(cls, base_pruner: BasePruner | None = None, **_: Any) -> QuotaPruner:
        """Return a pruner that Optuna recognises as Hyperband if it wraps Hyperband."""
        hyperband = isinstance(base_pruner, HyperbandPruner) and cls is QuotaPruner
        return object.__new__(_QuotaHyperbandPruner if hyperband else cls)

    def __init__(
        self,
        base_pruner: BasePruner | None = None,
        *,
        limits: Limits | None = None,
        interrupt: bool = False,
        meters: Sequence[Meter] = (),
    ) -> None:
        if base_pruner is not None and not isinstance(base_pruner, BasePruner):
            raise TypeError(
                f"`base_pruner` must be an Optuna pruner or None but got {base_pruner}."
                f"{_optuna.misplaced(base_pruner)}"
            )
        limits = Limits() if limits is None else limits
        if not isinstance(limits, Limits):
            raise TypeError(
                f"`limits` must be Limits but got {limits!r}.{_optuna.misplaced(limits)}"
            )
        check_flags(interrupt=interrupt)
        self.base_pruner = base_pruner
        self.limits = limits
        self.interrupt = interrupt
        self.meters = check_names(meters)
        _optuna.watch_tell()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that only the base pruner has, such as one of its arguments."""
        base = vars(self).get("base_pruner")
        if base is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __repr__(self) -> str:
        base = "" if self.base_pruner is None else f"{type(self.base_pruner).__name__}(), "
        return f"QuotaPruner({base}limits={self.limits!r})"

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether to prune a trial: it is over a limit, or the base pruner says so."""
        if is_rejected(trial.user_attrs):
            return True
        whole = _optuna.unwrap_study(study)
        if whole.pruner is not self:
            wrap_nesting_pruner(whole)
        monitor = self.watch_trial(study, trial)
        pruned = _find_stop(whole, trial, monitor) is not None
        if not pruned and self.base_pruner is not None:
            pruned = self.base_pruner.prune(study, trial)
        if pruned and monitor.verdict is None and not self._is_nested_in(whole.pruner):
            when = "" if trial.last_step is None else f" at step {trial.last_step}"
            name = type(self.base_pruner).__name__
            monitor.verdict = Verdict("pruned", f"{name} pruned it{when}.")
        if monitor.owner == _OWNER:
            record_usage(study, trial, monitor, ends=pruned)
        return pruned

    def watch_trial(self, study: Study, trial: BaseTrial | FrozenTrial) -> TrialMonitor:
        """Return the monitor of a running trial; start it if QuotaSampler has not."""
        monitor = metering_loop().find(key_of(study, trial))
        if monitor is None:
            pruner = _optuna.unwrap_study(study).pruner
            pruners = nesting.quota_pruners(pruner if self._is_nested_in(pruner) else self)
            limits = nesting.pruner_limits(pruners) or Limits()
            is_preemptible = bool(preemption_of(study).signals)
            warn_of_ceilings(study, limits, has_purpose=is_preemptible)
            monitor = start_monitor(
                study, trial, _OWNER, limits=limits, meters=nesting.pruner_meters(pruners)
            )
            if trial.datetime_start is not None:
                # Optuna's times are local and naive.
                elapsed = datetime.datetime.now() - trial.datetime_start
                monitor.started -= max(0.0, elapsed.total_seconds())
        return monitor

    def _is_nested_in(self, pruner: BasePruner) -> bool:
        """Return whether another pruner holds this one and may overrule it."""
        return pruner is not self and any(each is self for each in nesting.quota_pruners(pruner))


def wrap_nesting_pruner(study: Study) -> None:
    """Wrap a study's pruner in a QuotaPruner if it holds one.

    The outer pruner may overrule the nested one, or not call it: ``PatientPruner`` waits for the
    values to get worse. A breach must still end the trial.
    """
    pruner = study.pruner
    nested = [] if isinstance(pruner, QuotaPruner) else nesting.find_nested(pruner, QuotaPruner)
    if not nested:
        return
    study.pruner = QuotaPruner(
        pruner,
        limits=nesting.pruner_limits(nested),
        interrupt=any(each.interrupt for each in nested),
        meters=nesting.pruner_meters(nested),
    )


# Without a QuotaSampler, the outer pruner may never call the nested one.
_optuna.on_tell(lambda study, _: wrap_nesting_pruner(_optuna.unwrap_study(study)))


# `help` and `inspect.signature` look at `__new__` first.
QuotaPruner.__new__.__signature__ = inspect.signature(QuotaPruner.__init__)  # type: ignore[attr-defined]


class _QuotaHyperbandPruner(QuotaPruner, _optuna.HyperbandInterface):
    """A QuotaPruner that Optuna recognises as Hyperband."""


def check(trial: BaseTrial) -> None:
    """Raise an error if a trial exceeds one of its limits or must not run.

    For objectives that cannot call ``trial.should_prune()``: multi-objective studies,
    ask-and-tell, and objectives that report nothing.

    Example:

        .. code-block:: python

            def objective(trial):
                x = trial.suggest_float("x", 0, 1)
                for batch in batches:
                    train(batch, x)
                    optuna_quota.check(trial)
                return loss, latency

    Args:
        trial: The running trial, or a wrapper of it. With ``TorchDistributedTrial``, each process
            of the group must call this, and it raises in all of them or in none. A trial that does
            not belong to a study, such as ``FixedTrial``, is not checked.

    Raises:
        LimitBreached: If the trial is over a limit, or over what is left of a quota.
        TrialPreempted: If it has to end now, and runs again later.
        TrialRejected: If the trial was rejected.
        TypeError: If ``trial`` is no trial, but a study, say.
        ValueError: If this process held more than the memory limit before the study's first trial.
    """
    error = _find_error(trial)
    if error is not None:
        raise error


def _find_error(trial: BaseTrial) -> Exception | None:
    """Return the error to raise for a trial, None if it may continue."""
    ask_study = getattr(type(trial), "_quota_check", None)
    if ask_study is not None:
        # The trial runs in its own process, and the study's process monitors it.
        found: Breach | None = ask_study(trial)
        return None if found is None else breach_error(found)
    unwrapped = _unwrap(trial)
    if unwrapped is not trial:
        return _find_error(unwrapped)
    if _optuna.is_distributed(trial):
        return _find_common_error(trial)
    study = getattr(trial, "study", None)
    if study is None:
        if not isinstance(trial, BaseTrial) and not hasattr(trial, "suggest_float"):
            raise TypeError(f"`trial` must be an Optuna trial but got {trial!r}.")
        return None
    if is_rejected(trial.user_attrs):
        return rejection_error(trial.user_attrs)
    monitor = metering_loop().find(key_of(study, trial))
    if monitor is None:
        pruners = nesting.quota_pruners(study.pruner)
        monitor = pruners[0].watch_trial(study, trial) if pruners else None
    return _find_stop(study, trial, monitor)


def _find_stop(
    study: Study, trial: BaseTrial | FrozenTrial, monitor: TrialMonitor | None
) -> LimitBreached | None:
    """Return and record the error of a trial that has to stop, None if it may continue."""
    breach = None if monitor is None else record_breach(monitor)
    if monitor is None or breach is None:
        return find_preemption(study, trial)
    raise_if_never_fits(study, monitor)
    tolerate_constraints_failure(study, trial, monitor)
    return breach_error(breach)


def _unwrap(trial: BaseTrial) -> BaseTrial:
    """Return the trial inside a wrapper, or the trial itself."""
    if isinstance(trial, Trial):
        return trial
    nested: list[Any] = nesting.find_nested(trial, BaseTrial)
    running = (t for t in nested if isinstance(t, Trial) or _optuna.is_distributed(t))
    return next(running, trial)


def _find_common_error(trial: BaseTrial) -> Exception | None:
    """Return the same error in all processes of a distributed trial.

    Only that of rank 0 has the trial. The others wait for its answer, so it must send one.
    """
    own: Exception | None = None

    def find() -> Exception | None:
        nonlocal own
        try:
            own = next(map(_find_error, nesting.find_nested(trial, Trial)), None)
        except Exception as error:  # noqa: BLE001 - it is raised below, in all processes
            own = error
        # What is sent to the others must be picklable.
        return own if own is None or isinstance(own, QuotaError) else RuntimeError(repr(own))

    sent: Exception | None = _optuna.call_at_rank_0(trial, find)
    return own or sent


def record_breach(monitor: TrialMonitor) -> Breach | None:
    """Measure a trial now; if it is over a limit, record that it is terminated for it."""
    if monitor.breach is None:
        monitor.sample()
    if monitor.breach is not None and monitor.verdict is None:
        monitor.verdict = Verdict("terminated", monitor.breach.reason, monitor.breach)
    return monitor.breach


def rejection_error(attributes: Mapping[str, Any]) -> TrialRejected:
    return TrialRejected(parse_record(attributes).reason or "The trial was rejected.")


class Interrupter:
    """Raises :class:`~optuna_quota.LimitBreached` inside the objective at a breach: best effort.

    A signal to the main thread ends sleeping, locking and reading within a millisecond, but has to
    wait for a running call into C. It is SIGURG, which a process that does not handle it ignores,
    so that one that comes too late is harmless.
    """

    def __init__(self, monitor: TrialMonitor) -> None:
        self._monitor = monitor
        self._breach: Breach | None = None
        self._before: Any = None
        self._thread = threading.main_thread().ident

    @classmethod
    def arm(cls, monitor: TrialMonitor) -> Interrupter | None:
        """Return one that is active, None outside the main thread and without the signal."""
        if not hasattr(signal, "SIGURG"):
            _logger.warning(
                "`interrupt=True` has no effect on this system, which lacks SIGURG: trials are "
                "stopped only where they call `trial.should_prune()` or `check(trial)`."
            )
            return None
        if threading.current_thread() is not threading.main_thread():
            return None
        interrupter = cls(monitor)
        interrupter._before = signal.signal(signal.SIGURG, interrupter._handle)
        monitor.on_breach(interrupter._send)
        return interrupter

    def disarm(self) -> None:
        if threading.current_thread() is threading.main_thread() and self._before is not None:
            signal.signal(signal.SIGURG, self._before)
            self._before = None

    def _send(self, breach: Breach) -> None:
        self._breach = breach
        if not self._monitor.closed and self._thread is not None:
            signal.pthread_kill(self._thread, signal.SIGURG)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        breach, monitor = self._breach, self._monitor
        if breach is None:
            if callable(self._before):
                self._before(signum, frame)
            return
        if monitor.closed or monitor.verdict is not None or monitor.isolation == "process":
            return
        if not _optuna.in_objective(frame):
            timer = threading.Timer(_RETRY_AFTER, self._send, (breach,))
            timer.daemon = True
            timer.start()
            return
        monitor.verdict = Verdict("terminated", breach.reason, breach)
        raise breach_error(breach)
