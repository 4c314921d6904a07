"""QuotaPruner: prunes a trial that is over a limit, and otherwise as the pruner it wraps."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import inspect
import threading
import time
from typing import Any
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner
from optuna.pruners import HyperbandPruner
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.active_trials import start_watch
from optuna_quota._enforcement.check import record_breach
from optuna_quota._enforcement.constraints import tolerate_constraints_failure
from optuna_quota._enforcement.nesting import find_nested
from optuna_quota._enforcement.nesting import pruner_limits
from optuna_quota._enforcement.nesting import pruner_meters
from optuna_quota._enforcement.nesting import quota_pruners
from optuna_quota._enforcement.trial_result import build_record
from optuna_quota._enforcement.trial_result import save_record
from optuna_quota._metering import check_names
from optuna_quota._metering import key_of
from optuna_quota._metering import Meter
from optuna_quota._metering import metering_loop
from optuna_quota._metering import Verdict
from optuna_quota._records import is_rejected
from optuna_quota._records import TrialRecord
from optuna_quota._resources import Limits


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial
    from optuna.trial import FrozenTrial

    from optuna_quota._metering import TrialMonitor


class QuotaPruner(BasePruner):
    """Prunes a trial that is over one of its limits, and otherwise as another pruner does.

    A breach prunes at the next ``trial.should_prune()``, whatever was reported. That is a
    cooperative stop: only :func:`~optuna_quota.isolated` stops a trial that does not ask.

    Example:

        .. code-block:: python

            pruner = QuotaPruner(MedianPruner(), limits=Limits(memory="4GiB", wall_time="5min"))
            study = optuna.create_study(pruner=pruner)

    It may stand inside another pruner, such as :class:`~optuna.pruners.PatientPruner`: a breach
    ends the trial even where the other one would let it go on. For this, a QuotaPruner with the
    same limits is put around the study's pruner.

    Without :class:`~optuna_quota.QuotaSampler`, a trial is metered from its first
    ``should_prune()`` on, and what was seen when it asked is recorded.

    Args:
        base_pruner: Any pruner, Hyperband included; None to prune for breaches alone.
        limits: Ceilings on each trial.
        interrupt: Whether to interrupt a trial that is over a limit and does not ask, by raising
            :class:`~optuna_quota.LimitBreached` inside the objective. Best effort: it reaches
            trials in the main thread under ``optimize``, between two bytecodes, so never inside
            a running call into C, and an objective that catches everything swallows it.
        meters: Meters of your own, by whose names ``Limits(custom=...)`` limits.

    Raises:
        TypeError: If ``base_pruner`` is no pruner or ``limits`` are no :class:`Limits`.
    """

    def __new__(cls, base_pruner: BasePruner | None = None, **_: Any) -> QuotaPruner:
        """Return one that Optuna recognises as Hyperband where Hyperband is wrapped."""
        hyperband = isinstance(base_pruner, HyperbandPruner) and cls is QuotaPruner
        return object.__new__(_QuotaHyperbandPruner if hyperband else cls)

    def __init__(
        self,
        base_pruner: BasePruner | None = None,
        *,
        limits: Limits,
        interrupt: bool = False,
        meters: Sequence[Meter] = (),
    ) -> None:
        if base_pruner is not None and not isinstance(base_pruner, BasePruner):
            raise TypeError(
                f"`base_pruner` must be an Optuna pruner or None but got {base_pruner!r}."
            )
        if not isinstance(limits, Limits):
            raise TypeError(f"`limits` must be Limits but got {limits!r}.")
        self.base_pruner = base_pruner
        self.limits = limits
        self.interrupt = interrupt
        self.meters = check_names(meters)
        self._notes = PrunerNotes()

    def __getattr__(self, name: str) -> Any:
        """Look up in the base pruner what it alone has, such as what it was made with."""
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
        watch = self.watch_trial(study, trial)
        breached = record_breach(watch) is not None
        if breached:
            tolerate_constraints_failure(study, trial, watch)
        pruned = breached or self._prune_by_base(study, trial)
        if pruned and watch.verdict is None and not self._is_inside(whole.pruner):
            watch.verdict = self._verdict_of_base(trial)
        if watch.owner == _OWNER:
            self._notes.take(study, trial, watch, ends=pruned)
        return pruned

    def watch_trial(self, study: Study, trial: BaseTrial | FrozenTrial) -> TrialMonitor:
        """Return the metering of a running trial; it starts here when nobody else started it."""
        watch = metering_loop().find(key_of(study, trial))
        if watch is None:
            pruner = _optuna.unwrap_study(study).pruner
            holder = pruner if self._is_inside(pruner) else self
            limits, meters = pruner_limits(holder), pruner_meters(holder)
            assert limits is not None
            watch = start_watch(study, trial, _OWNER, limits=limits, meters=meters)
            watch.started -= _seconds_since(trial.datetime_start)
            self._notes.adopt(watch)
        return watch

    def _prune_by_base(self, study: Study, trial: FrozenTrial) -> bool:
        return self.base_pruner is not None and self.base_pruner.prune(study, trial)

    def _verdict_of_base(self, trial: FrozenTrial) -> Verdict:
        name, step = type(self.base_pruner).__name__, trial.last_step
        when = "" if step is None else f" at step {step}"
        return Verdict("pruned", f"{name} pruned it{when}.")

    def _is_inside(self, pruner: BasePruner) -> bool:
        """Return whether another pruner decides what becomes of this one's answer."""
        return pruner is not self and any(each is self for each in quota_pruners(pruner))


def wrap_nesting_pruner(study: Study) -> None:
    """Put a QuotaPruner around a study's pruner that holds one.

    The pruner outside may overrule the one inside, or not ask it: ``PatientPruner`` waits for the
    values to get worse. A breach must end the trial all the same.
    """
    pruner = study.pruner
    inside = [] if isinstance(pruner, QuotaPruner) else find_nested(pruner, QuotaPruner)
    if not inside:
        return
    limits = pruner_limits(pruner)
    assert limits is not None
    outside = QuotaPruner(
        pruner,
        limits=limits,
        interrupt=any(each.interrupt for each in inside),
        meters=pruner_meters(pruner),
    )
    # Whichever is asked first notes what is known of the trial.
    for each in inside:
        each._notes = outside._notes
    study.pruner = outside


# What is looked at first, by `help` too.
QuotaPruner.__new__.__signature__ = inspect.signature(QuotaPruner.__init__)  # type: ignore[attr-defined]


class _QuotaHyperbandPruner(QuotaPruner, _optuna.HyperbandInterface):
    """A QuotaPruner that Optuna recognises as Hyperband."""


_OWNER = "pruner"


def _seconds_since(start: datetime.datetime | None) -> float:
    # Optuna's times are local and naive.
    return 0.0 if start is None else max(0.0, (datetime.datetime.now() - start).total_seconds())


# Notes may take a twentieth of a trial's time: a storage on disk needs milliseconds for one.
_SHARE = 20
# A memory this much higher than noted is noted at once.
_GROWTH = 1.1


class PrunerNotes:
    """Notes what a pruner saw of trials, seldom enough not to slow them.

    A pruner never learns that a trial has ended: what it knows of trials whose metering is closed
    it forgets when it takes on another one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[Any, _Page] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind: what is metered is metered in this process."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew."""
        self.__init__()  # type: ignore[misc]  # nothing of the state survives on purpose

    def __len__(self) -> int:
        return len(self._pages)

    def adopt(self, watch: TrialMonitor) -> None:
        """Take on a new trial, and forget those that are over."""
        with self._lock:
            self._pages = {k: page for k, page in self._pages.items() if not page.watch.closed}
            self._pages[watch.key] = _Page(watch)

    def take(self, study: Study, trial: FrozenTrial, watch: TrialMonitor, *, ends: bool) -> None:
        """Note what is known of a trial when that is due, or when it is told to end."""
        page = self._pages.get(watch.key)
        if page is None or watch.recorded:
            return
        if ends:
            watch.recorded = True
            self._write(study, trial, page, TrialState.PRUNED)
        elif page.is_due():
            self._write(study, trial, page, None)

    def _write(
        self, study: Study, trial: FrozenTrial, page: _Page, state: TrialState | None
    ) -> None:
        watch, started = page.watch, time.perf_counter()
        usage = watch.usage()
        if state is None:
            record = TrialRecord(usage=usage, isolation=watch.isolation)
        else:
            record = build_record(watch, usage, state)
        save_record(study, trial, record)
        page.noted(usage.memory, time.perf_counter() - started)


class _Page:
    """What is known of the notes on one trial."""

    def __init__(self, watch: TrialMonitor) -> None:
        self.watch = watch
        self._memory = 0.0
        self._next = 0.0

    def is_due(self) -> bool:
        """Return whether to note something now."""
        grown = (self.watch.usage().memory or 0.0) > self._memory * _GROWTH
        return grown or time.perf_counter() >= self._next

    def noted(self, memory: float | None, cost: float) -> None:
        """Put down that something was noted, and how many seconds that took."""
        self._memory = memory or 0.0
        self._next = time.perf_counter() + _SHARE * cost
