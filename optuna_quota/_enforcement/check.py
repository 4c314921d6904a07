"""Is a running trial over a limit? For pruners, and for objectives that can't ask a pruner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING

from optuna.trial import BaseTrial
from optuna.trial import Trial

from optuna_quota import _optuna
from optuna_quota._enforcement.constraints import tolerate_constraints_failure
from optuna_quota._enforcement.nesting import find_nested
from optuna_quota._enforcement.nesting import quota_pruners
from optuna_quota._metering import key_of
from optuna_quota._metering import metering_loop
from optuna_quota._metering import Verdict
from optuna_quota._records import is_rejected
from optuna_quota._records import parse_record
from optuna_quota._resources import Breach
from optuna_quota.exceptions import LimitBreached
from optuna_quota.exceptions import QuotaError
from optuna_quota.exceptions import TrialRejected


if TYPE_CHECKING:
    from optuna_quota._metering import TrialMonitor


def check(trial: BaseTrial) -> None:
    """Raise when a trial is over one of its limits, or must not run at all.

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
            of the group must call this, and it raises in all of them or in none. For a trial that
            does not run, such as ``FixedTrial``, nothing is checked.

    Raises:
        LimitBreached: If the trial is over a limit, or over what is left of a quota.
        TrialRejected: If the trial was rejected.
    """
    error = _find_error(trial)
    if error is not None:
        raise error


def _find_error(trial: BaseTrial) -> Exception | None:
    """Return what to raise for a trial, None when it may go on."""
    ask = getattr(type(trial), "_quota_check", None)
    if ask is not None:
        # The trial runs in a process of its own: the study's process knows.
        found: Breach | None = ask(trial)
        return None if found is None else breach_error(found)
    running = _running_inside(trial)
    if running is not trial:
        return _find_error(running)
    if _optuna.is_distributed(trial):
        return _find_error_together(trial)
    study = getattr(trial, "study", None)
    if study is None:
        return None
    if is_rejected(trial.user_attrs):
        return _rejection_error(trial.user_attrs)
    watch = metering_loop().find(key_of(study, trial))
    if watch is None:
        pruners = quota_pruners(study.pruner)
        watch = pruners[0].watch_trial(study, trial) if pruners else None
    if watch is None or (breach := record_breach(watch)) is None:
        return None
    tolerate_constraints_failure(study, trial, watch)
    return breach_error(breach)


def _running_inside(trial: BaseTrial) -> BaseTrial:
    """Return the running or distributed trial that a wrapper holds, else the trial itself."""
    if isinstance(trial, Trial):
        return trial
    inside: list[Any] = find_nested(trial, BaseTrial)
    running = (t for t in inside if isinstance(t, Trial) or _optuna.is_distributed(t))
    return next(running, trial)


def _find_error_together(trial: BaseTrial) -> Exception | None:
    """Return the same for all processes of a distributed trial.

    Only that of rank 0 has the trial. The others wait for its answer, so it must give one.
    """
    own: Exception | None = None

    def find() -> Exception | None:
        nonlocal own
        try:
            own = next(map(_find_error, find_nested(trial, Trial)), None)
        except Exception as fault:  # noqa: BLE001 - it is raised below, in all processes
            own = fault
        # Others can be told only what can be pickled.
        return own if own is None or isinstance(own, QuotaError) else RuntimeError(repr(own))

    told: Exception | None = _optuna.call_at_rank_0(trial, find)
    return own or told


def record_breach(watch: TrialMonitor) -> Breach | None:
    """Measure a trial now; when it is over a limit, put down that it is terminated for it."""
    if watch.breach is None:
        watch.sample()
    if watch.breach is not None and watch.verdict is None:
        watch.verdict = Verdict("terminated", watch.breach.reason, watch.breach)
    return watch.breach


def breach_error(breach: Breach) -> LimitBreached:
    """Return the error for a breach."""
    return LimitBreached(
        breach.reason,
        resource=breach.resource,
        limit=breach.limit,
        observed=breach.observed,
        seconds=breach.seconds,
    )


def raise_breached(breach: Breach) -> NoReturn:
    """Raise for a breach."""
    raise breach_error(breach)


def raise_rejected(attributes: Mapping[str, Any]) -> NoReturn:
    """Raise for a row that says that it is rejected."""
    raise _rejection_error(attributes)


def _rejection_error(attributes: Mapping[str, Any]) -> TrialRejected:
    return TrialRejected(parse_record(attributes).reason or "The trial was rejected.")
