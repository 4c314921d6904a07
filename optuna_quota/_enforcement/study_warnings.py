"""Warnings about a study's limits and quotas that can't be enforced or were exceeded.

Each topic is logged once for each study in a process. A limit that no trial can ever meet is an
error instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
from dataclasses import dataclass, field
import gc
import logging
import os
import threading

from optuna import TrialPruned
from optuna.study import Study
from optuna.trial import TrialState

from optuna_quota import _optuna, _records
from optuna_quota._enforcement.nesting import find_nested, pruner_limits, quota_pruners
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering import Key, metering_loop, TrialMonitor, Verdict
from optuna_quota._metering.host import cpu_count, host_memory_limit, total_memory
from optuna_quota._metering.meter import forget_warnings
from optuna_quota._records import TrialRecord
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource
from optuna_quota._storage_retry import retry
from optuna_quota._units import SECONDS
from optuna_quota._usage import Breach


_logger = logging.getLogger("optuna.quota.enforcement")

# A breach was noticed late if the trial exceeded its limit by more than this share, and a limit on
# time by this many seconds; of the rest of a quota, by this share of the whole quota.
_LATE_SHARE = 0.1
_LATE_SECONDS = 1.0
# Memory held before a trial is reported from this share of its limit on, and growth from trial to
# trial from the smaller share on.
_HELD_SHARE = 0.5
_GROWN_SHARE = 0.1

# Bytes; torch itself keeps less, such as the workspaces of cuBLAS.
_NOTICEABLE_ON_GPU = 256 * 2**20

_ISOLATED = "`isolated(objective)`"
_STOPPED_ANYWHERE = f"{_ISOLATED} stops it at any moment."
_WHERE_STOPPED = (
    "In process, a trial is stopped only where it calls `trial.should_prune()` or "
    f"`optuna_quota.check(trial)`; {_STOPPED_ANYWHERE}"
)
_WHERE_STOPPED_UNPRUNED = (
    "In process, a trial of a study without a QuotaPruner is stopped only where it calls "
    f"`optuna_quota.check(trial)`, not by `trial.should_prune()`; {_STOPPED_ANYWHERE}"
)


@dataclass
class _Known:
    """Topics logged for one study in this process, and its first trial here."""

    topics: set[str] = field(default_factory=set)
    first: Key | None = None
    held_at_first: float = 0.0


_studies: dict[str, _Known] = {}
_lock = threading.Lock()


def _known(study: Study) -> _Known:
    place = _optuna.address_of(_optuna.storage_of(study))
    key = f"{place} {_optuna.study_id_of(study)} {study.study_name}"
    with _lock:
        if key not in _studies:
            _studies[key] = _Known()
            # Warnings about this machine, logged once in a process, concern this study too.
            forget_warnings()
        return _studies[key]


def note_topics(study: Study, *topics: str) -> bool:
    """Note topics of a study; return whether any of them is new in this process."""
    known = _known(study)
    with _lock:
        is_new = not known.topics.issuperset(topics)
        known.topics.update(topics)
        return is_new


def warn_once(study: Study, topic: str, message: str) -> None:
    """Log a warning unless one on this topic was logged for the study in this process."""
    if note_topics(study, topic):
        _logger.warning(message)


# Before the first trial.


def warn_of_ceilings(
    study: Study, limits: Limits, quota: Quota | None = None, *, has_purpose: bool
) -> None:
    """Warn of limits above what the machine has or the quota allows, and if there are none.

    ``has_purpose`` is whether a sampler or pruner without limits serves something else.
    """
    if not note_topics(study, "ceilings"):
        return
    if not limits and not quota:
        if not has_purpose:
            _logger.warning(
                "Nothing is limited: usage is only recorded. Set a ceiling, such as "
                'QuotaPruner(limits=Limits(memory="4GiB")) or '
                'QuotaSampler(quota=Quota(wall_time="2h")).'
            )
        return
    problems = describe_ceilings(limits, quota, read_machine(limits, quota))
    if problems:
        _logger.warning(f"{' '.join(problems)} Lower what is too high.")


def warn_of_unapplied(study: Study, limits: Limits) -> None:
    """Warn of a study with a quota or limits that this process runs without a QuotaSampler."""
    stored = retry(lambda: _optuna.user_attrs_of(study))
    unapplied = ["a quota"] * bool(stored.get(_records.STUDY_QUOTA))
    unapplied += ["limits"] * bool(stored.get(_records.STUDY_LIMITS) and not limits)
    if unapplied:
        message = (
            f"The storage of the study {study.study_name!r} has {' and '.join(unapplied)}, which "
            "this worker does not apply: Optuna stores no sampler and no pruner. Pass "
            "QuotaSampler and QuotaPruner to `load_study` or `create_study` again."
        )
        warn_once(study, "unapplied", message)


def read_machine(limits: Limits, quota: Quota | None) -> dict[str, float]:
    """Return what this machine has of each limited resource, where known."""
    reads: Mapping[str, Callable[[], float | None]] = {
        "memory": host_memory_limit,
        "cpu_cores": cpu_count,
        "gpu_memory": lambda: total_memory(os.environ),
    }
    held = {**limits.amounts(), **(quota.held if quota else {})}
    found = {name: read() for name, read in reads.items() if name in held}
    return {name: amount for name, amount in found.items() if amount is not None}


def describe_ceilings(
    limits: Limits, quota: Quota | None, machine: Mapping[str, float]
) -> list[str]:
    """Return a sentence for each limit or quota that can't take effect."""
    amounts = limits.amounts()
    of_quota = {} if quota is None else quota.amounts()
    found = []
    for what, ceilings in (("limit", amounts), ("quota", of_quota)):
        for name, most in machine.items():
            if ceilings.get(name, 0.0) > most:
                found.append(
                    f"The {what} of {format_amount(name, ceilings[name])} on "
                    f"{get_resource(name).title} is more than the {format_amount(name, most)} "
                    "that this machine or container has, and can't take effect."
                )
    for name, total in of_quota.items():
        used = CHARGED_RESOURCES.get(name, name)
        if amounts.get(used, 0.0) > total:
            found.append(
                f"The limit of {format_amount(used, amounts[used])} on "
                f"{get_resource(used).title} of a trial is more than the quota of "
                f"{format_amount(name, total)} ({get_resource(name).title}) of the whole study."
            )
    return found


# While a trial runs.


def is_first_trial(study: Study) -> bool:
    return _known(study).first is None


def note_start(study: Study, monitor: TrialMonitor) -> None:
    known = _known(study)
    with _lock:
        if known.first is None:
            known.first, known.held_at_first = monitor.key, monitor.held or 0.0


def raise_if_never_fits(study: Study, monitor: TrialMonitor) -> None:
    """Raise ValueError if the first trial of a study in this process began over its limit."""
    ceiling = monitor.hard_ceilings.get("memory")
    if ceiling is not None and _began_over(study, monitor, ceiling.limit):
        assert monitor.held is not None
        error = never_fits(ceiling.limit, monitor.held, quota=ceiling.quota)
        monitor.verdict = Verdict("failed", str(error))
        # Covered by another message.
        note_topics(study, "never", "late", "held", "grown")
        raise error


def _began_over(study: Study, monitor: TrialMonitor, limit: float) -> bool:
    """Return whether this process was over the limit before the first trial, and still is."""
    is_first = monitor.isolation == "thread" and _known(study).first == monitor.key
    return is_first and (monitor.held or 0.0) > limit and (_memory_now() or 0.0) > limit


def _memory_now() -> float | None:
    gc.collect()
    loop = metering_loop()
    with contextlib.closing(loop.open_tree(None)) as tree:
        return tree.read(thorough=True, without=loop.trees.excluded_pids).memory


def never_fits(limit: float, held: float, *, quota: bool, isolated: bool = False) -> ValueError:
    """Return the error for a memory limit below what an empty trial needs."""
    if isolated:
        what = "a trial takes {} before its objective begins"
        cure = "Raise it, or import less and give the objective less data to carry."
    else:
        what = "this process held {} before its first trial began"
        cure = f"Raise it, or use {_ISOLATED}, which measures each trial in a process of its own."
    return ValueError(
        f"The {'quota' if quota else 'limit'} of {format_amount('memory', limit)} on memory can "
        f"never hold: {what.format(format_amount('memory', held))}. {cure}"
    )


# After a trial.


def report_end(
    study: Study,
    number: int,
    monitor: TrialMonitor,
    record: TrialRecord,
    error: BaseException | None,
) -> None:
    """Log the reason of a terminated trial, and warn if its limit was not enforced in time.

    To be called after its metering is closed, and before Optuna logs the objective's error.
    """
    if record.outcome == "terminated" and record.reason:
        if isinstance(error, TrialPruned):
            if record.reason not in str(error):
                error.args = (f"{error} {record.reason}".strip(),)
        elif error is not None:
            _logger.warning(f"Trial {number} failed after it was stopped. {record.reason}")
    if monitor.isolation not in ("thread", "shared"):
        return
    _warn_of_held(study, number, monitor)
    _warn_of_held_on_gpu(study, number, monitor)
    if (breach := record.breach) is not None:
        used = monitor.usage().get(breach.resource) or breach.observed
        completed = record.outcome == "completed"
        quota = monitor.most.get(breach.resource, breach.limit)
        late = _describe_late(number, breach, used, quota=quota, completed=completed)
        if late is not None:
            has_pruner = bool(quota_pruners(study.pruner))
            where = _WHERE_STOPPED if has_pruner else _WHERE_STOPPED_UNPRUNED
            warn_once(study, "late", f"{late} {where}")


def _describe_late(
    number: int, breach: Breach, used: float, *, quota: float, completed: bool
) -> str | None:
    resource = get_resource(breach.resource)
    beyond = _LATE_SHARE * (quota if breach.quota else breach.limit)
    if resource.unit is SECONDS:
        beyond = max(beyond, _LATE_SECONDS)
    is_late = used - breach.limit > beyond or (completed and not breach.quota)
    if breach.forecast or not is_late:
        return None
    return (
        f"Trial {number} {'completed' if completed else 'went on'} over a limit: it used "
        f"{resource.format(used)} of {resource.title}, {resource.format(breach.limit)} "
        f"{'was left' if breach.quota else 'allowed'}."
    )


def _warn_of_held(study: Study, number: int, monitor: TrialMonitor) -> None:
    ceiling, held = monitor.hard_ceilings.get("memory"), monitor.held
    if monitor.isolation != "thread" or held is None or ceiling is None:
        return
    limit = ceiling.limit
    if held < _HELD_SHARE * limit:
        return
    if _began_over(study, monitor, limit):
        note_topics(study, "late", "held", "grown")
        warn_once(study, "never", str(never_fits(limit, held, quota=ceiling.quota)))
        return
    known = _known(study)
    grown = held - known.held_at_first
    size, most = format_amount("memory", held), format_amount("memory", limit)
    if known.first != monitor.key and grown >= _GROWN_SHARE * limit:
        warn_once(
            study,
            "grown",
            f"Before trial {number} began this process held {size}, "
            f"{format_amount('memory', grown)} more than before the first trial: earlier ones "
            "left it behind, or the script has loaded it since. In process that counts toward the "
            f"{most} that a trial may use. Free it at the end of the objective, or use "
            f"{_ISOLATED}: each trial starts anew.",
        )
    else:
        warn_once(
            study,
            "held",
            f"Before trial {number} began this process held {size} (modules, data loaded once). "
            f"In process that counts toward the {most} that a trial may use. Allow for it, or use "
            f"{_ISOLATED}, which counts what the trial itself holds.",
        )


def _warn_of_held_on_gpu(study: Study, number: int, monitor: TrialMonitor) -> None:
    ceiling, held = monitor.hard_ceilings.get("gpu_memory"), monitor.held_on_gpu
    if ceiling is None or held < _NOTICEABLE_ON_GPU:
        return
    size, most = (format_amount("gpu_memory", amount) for amount in (held, ceiling.limit))
    warn_once(
        study,
        "held on a GPU",
        f"Before trial {number} began tensors of this process held {size} of GPU memory. In "
        f"process that counts toward the {most} that a trial may use. Delete them, or use "
        f"{_ISOLATED}, which counts what the trial itself holds.",
    )


def _after_tell(study: Study, trial_id: int) -> None:
    storage = _optuna.storage_of(study)
    monitor = metering_loop().find((_optuna.number_of(storage), trial_id))
    if monitor is not None and monitor.owner == "pruner":
        monitor.close()
        verdict = monitor.verdict or Verdict("completed", "")
        record = TrialRecord(
            outcome=verdict.outcome, reason=verdict.reason or None, breach=monitor.breach
        )
        number = storage.get_trial_number_from_id(trial_id)
        report_end(study, number, monitor, record, _optuna.objective_error())
        return
    if isinstance(study.sampler, _optuna.StudyPart) or find_nested(
        study.sampler, _optuna.StudyPart
    ):
        return
    topics, limits = _known(study).topics, pruner_limits(quota_pruners(study.pruner))
    may_be_replaced = monitor is None and "replaced" not in topics
    is_replaced = may_be_replaced and _optuna.was_created_with_sampler(study)
    if not is_replaced and (not limits or "unmeasured" in topics):
        return
    row = storage.get_trial(trial_id)
    if is_replaced:
        if _records.RESERVATION in row.system_attrs:
            # A trial of the QuotaSampler, but `tell` was called on another `Study`.
            return
        warn_once(
            study,
            "replaced",
            f"Trial {row.number} was sampled by {type(study.sampler).__name__}, which has "
            "replaced the study's QuotaSampler, as with LightGBMTuner. Such trials are neither "
            "measured nor limited by the quota. Write the search as an objective for "
            "`study.optimize`, which keeps the sampler.",
        )
    if limits and row.state == TrialState.COMPLETE:
        if _records.read_record(row).isolation is not None:
            note_topics(study, "unmeasured")
            return
        # The objective never called the pruner.
        warn_once(
            study,
            "unmeasured",
            f"Trial {row.number} completed without a check of its limits, {limits!r}. "
            f"{_WHERE_STOPPED}",
        )


def _listen(study: Study, trial_id: int) -> None:
    try:
        _after_tell(_optuna.unwrap_study(study), trial_id)
    except Exception as error:  # noqa: BLE001 - any backend's own; the result is stored already
        _logger.debug(f"The end of the trial with id {trial_id} was not checked: {error!r}.")


_optuna.on_tell(_listen)
