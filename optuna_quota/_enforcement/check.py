"""Is a running trial over a limit? For pruners, and for objectives that can't ask a pruner."""

from __future__ import annotations

from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING

from optuna_quota._metering import key_of
from optuna_quota._metering import metering_loop
from optuna_quota._metering import Verdict
from optuna_quota._records import is_rejected
from optuna_quota._records import parse_record
from optuna_quota._resources import Breach
from optuna_quota.exceptions import LimitBreached
from optuna_quota.exceptions import TrialRejected


if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from optuna_quota._metering import Watch


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
        trial: The running trial. For any other, such as ``FixedTrial``, nothing is checked.

    Raises:
        LimitBreached: If the trial is over a limit, or over what is left of a quota.
        TrialRejected: If the trial was rejected.
    """
    ask = getattr(trial, "_quota_check", None)
    if ask is not None:
        _raise_if_breached(ask())
        return
    study = getattr(trial, "study", None)
    if study is None:
        return
    if is_rejected(trial.user_attrs):
        raise_rejected(trial.user_attrs)
    watch = metering_loop().find(key_of(study, trial))
    if watch is None:
        find_watch = getattr(study.pruner, "watch_trial", None)
        watch = None if find_watch is None else find_watch(study, trial)
    if watch is not None:
        _raise_if_breached(condemn(watch))


def condemn(watch: Watch) -> Breach | None:
    """Measure a trial now; when it is over a limit, put down that it is terminated for it."""
    if watch.breach is None:
        watch.sample()
    if watch.breach is not None and watch.verdict is None:
        watch.verdict = Verdict("terminated", watch.breach.reason, watch.breach)
    return watch.breach


def raise_breached(breach: Breach) -> NoReturn:
    """Raise for a breach."""
    raise LimitBreached(
        breach.reason,
        resource=breach.resource,
        limit=breach.limit,
        observed=breach.observed,
        seconds=breach.seconds,
    )


def raise_rejected(attributes: Any) -> NoReturn:
    """Raise for a row that says that it is rejected."""
    raise TrialRejected(parse_record(attributes).reason or "The trial was rejected.")


def _raise_if_breached(breach: Breach | None) -> None:
    if breach is not None:
        raise_breached(breach)
