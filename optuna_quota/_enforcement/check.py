"""Check a running trial against its limits: for pruners, and for objectives that can't ask one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TYPE_CHECKING

from optuna.trial import BaseTrial, Trial

from optuna_quota import _optuna
from optuna_quota._enforcement.constraints import tolerate_constraints_failure
from optuna_quota._enforcement.nesting import find_nested, quota_pruners
from optuna_quota._enforcement.preemption import find_preemption
from optuna_quota._enforcement.study_warnings import raise_if_never_fits
from optuna_quota._metering import key_of, metering_loop, Verdict
from optuna_quota._records import is_rejected, parse_record
from optuna_quota._resources import Breach
from optuna_quota.exceptions import LimitBreached, QuotaError, TrialRejected


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
            of the group must call this, and it raises in all of them or in none. A trial that does
            not belong to a study, such as ``FixedTrial``, is not checked.

    Raises:
        LimitBreached: If the trial is over a limit, or over what is left of a quota.
        TrialPreempted: If it has to end now, and runs again later.
        TrialRejected: If the trial was rejected.
        ValueError: If this process held more than the memory limit before the study's first trial.
    """
    error = _find_error(trial)
    if error is not None:
        raise error


def _find_error(trial: BaseTrial) -> Exception | None:
    """Return what to raise for a trial, None when it may go on."""
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
        return None
    if is_rejected(trial.user_attrs):
        return _rejection_error(trial.user_attrs)
    monitor = metering_loop().find(key_of(study, trial))
    if monitor is None:
        pruners = quota_pruners(study.pruner)
        monitor = pruners[0].watch_trial(study, trial) if pruners else None
    breach = None if monitor is None else record_breach(monitor)
    if monitor is None or breach is None:
        return find_preemption(study, trial)
    raise_if_never_fits(study, monitor)
    tolerate_constraints_failure(study, trial, monitor)
    return breach_error(breach)


def _unwrap(trial: BaseTrial) -> BaseTrial:
    """Return the running or distributed trial that a wrapper holds, else the trial itself."""
    if isinstance(trial, Trial):
        return trial
    nested: list[Any] = find_nested(trial, BaseTrial)
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
            own = next(map(_find_error, find_nested(trial, Trial)), None)
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


def breach_error(breach: Breach, reason: str | None = None) -> LimitBreached:
    """Return the error for a breach, by default with its own reason."""
    return LimitBreached(
        reason or breach.reason,
        resource=breach.resource,
        limit=breach.limit,
        observed=breach.observed,
        seconds=breach.seconds,
    )


def raise_breached(breach: Breach) -> NoReturn:
    """Raise the error for a breach."""
    raise breach_error(breach)


def raise_rejected(attributes: Mapping[str, Any]) -> NoReturn:
    """Raise the error for a rejected trial with these user attributes."""
    raise _rejection_error(attributes)


def _rejection_error(attributes: Mapping[str, Any]) -> TrialRejected:
    return TrialRejected(parse_record(attributes).reason or "The trial was rejected.")
