"""Turns the end of a trial's process into a value, an error, a breach or a crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
import itertools
import logging
import math
import os
import signal
from typing import Any, Literal, NoReturn

from optuna import TrialPruned
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.preemption import end_as_preempted, enqueue_again
from optuna_quota._enforcement.study_warnings import never_fits
from optuna_quota._enforcement.trial_result import read_row, tolerate_constraints_failure
from optuna_quota._isolation import messages, out_of_memory
from optuna_quota._isolation.channel import unpack_error
from optuna_quota._isolation.launch import IsolationOptions
from optuna_quota._isolation.messages import ExitReport
from optuna_quota._isolation.script_process import ScriptFailed
from optuna_quota._isolation.server import Server
from optuna_quota._metering import TrialMonitor, Verdict
from optuna_quota._metering.breach import Ceilings, find_refused_breach
from optuna_quota._metering.host import device_memory, free_memory
from optuna_quota._metering.meter import DeviceShare, GpuUse
from optuna_quota._records import CRASHED, is_rejected, write_attributes
from optuna_quota._resources import format_amount
from optuna_quota._storage_retry import retry
from optuna_quota._units import format_seconds, format_signal
from optuna_quota._usage import Breach, breach_error, Usage
from optuna_quota.exceptions import LimitBreached, TrialCrashed, TrialPreempted


_logger = logging.getLogger("optuna.quota.isolated")

CrashStatus = Literal["crashed", "ended", "running"]

# A trial's reason says when it ended if that was this many seconds after its breach.
_LONG_END = 1.0

# How often a trial that found its GPU full is tried again.
_MAX_GPU_RETRIES = 3

# The study ends when this many trials, its first ones or any in a row, have all crashed.
FIRST_CRASHES = 3
CRASHES_IN_A_ROW = 5

INTERRUPTED = "The study was interrupted (KeyboardInterrupt)."
_HINT = "Call the objective without `isolated` on `study.ask()` to see why; "


@dataclass
class OutcomeResolver:
    """Returns the value of a trial or raises what ended it, and sets the trial's verdict."""

    trial: BaseTrial
    study: Study | None
    monitor: TrialMonitor
    options: IsolationOptions
    _gpu_devices: Sequence[DeviceShare] = ()

    def measure_gpus(self) -> None:
        self.monitor.sample(fully=True)
        self._gpu_devices = () if self.monitor.gpu is None else self.monitor.gpu.devices

    def resolve(self, server: Server) -> Any:
        report, outcome = self._add_usage(server), server.outcome
        if server.breach is not None and server.never_fits:
            limit, held = server.breach.limit, server.breach.observed
            error = never_fits(limit, held, quota=server.breach.quota, isolated=True)
            self.monitor.verdict = Verdict("failed", str(error))
            raise error
        if server.breach is not None:
            self._terminate(server.breach, killed=report.killer is not None)
        if isinstance(outcome, messages.Returned):
            return self._return(outcome.value, report, server)
        if isinstance(outcome, messages.Raised):
            return self._raise(outcome, report, server)
        if isinstance(outcome, messages.Unsendable):
            reason = outcome.reason
        elif isinstance(outcome, messages.Exited):
            reason = f"The objective ended its process by sys.exit({outcome.argument})."
        else:
            self._terminate_at_limit(report)
            reason = describe_exit(report)
        return self.crash(report, reason)

    def has_ended_early(self, server: Server) -> bool:
        """Return whether a preempted trial ended without a result.

        Its error may be due to the signal, which may have ended some of its processes.
        """
        outcome, verdict = server.outcome, self.monitor.verdict
        if server.breach is not None or isinstance(outcome, messages.Returned):
            return False
        if not isinstance(outcome, messages.Raised) or outcome.stop_requested:
            return True
        is_preempted = verdict is not None and verdict.outcome == "preempted"
        return is_preempted or not isinstance(unpack_error(outcome.error), TrialPruned)

    def preempt(self, server: Server, reason: str, grace_period: float) -> Any:
        """Return the value of a preempted trial if ``optimize`` runs it, else raise."""
        assert self.study is not None
        report = self._add_usage(server)
        if server.outcome is None and report.killer is not None:
            reason += f" The trial was killed, at most {grace_period:g} s after it had to stop."
        self.monitor.verdict = Verdict("preempted", reason)
        end_as_preempted(self.study, _optuna.trial_id_of(self.trial), reason)
        return self._end_without_value(reason, TrialPreempted(reason))

    def end_finished_outside(self, server: Server, reason: str) -> Any:
        """Return the value of a trial whose row was finished from outside, or raise."""
        self._add_usage(server)
        self.monitor.verdict = Verdict("failed", reason)
        self.monitor.close()
        if isinstance(server.outcome, messages.Returned):
            return server.outcome.value
        return self._end_without_value(reason, LimitBreached(reason))

    def end_interrupted(self, server: Server) -> None:
        reason = INTERRUPTED
        if server.exit is not None and self._add_usage(server).killer is not None:
            grace_period = self.options.grace_period
            reason += f" The trial took longer than {grace_period:g} s to end: it was killed."
        self.monitor.verdict = Verdict("failed", reason)

    def crash(self, report: ExitReport, reason: str, hint: str = _HINT) -> Any:
        """Return the value of a crashed trial if ``optimize`` is to continue, else raise."""
        self.monitor.verdict = Verdict("failed", reason)
        if report.traceback:
            _logger.error(f"Trial {self.trial.number}: {reason}\n{report.traceback}")
        error = TrialCrashed(reason, exitcode=report.exitcode, traceback=report.traceback)
        study, trial = self.study, self.trial
        if study is None or not isinstance(trial, Trial):
            raise error
        record_crash(study, trial)
        if not _optuna.is_run_by_optimize(trial):
            raise error
        series = find_crash_series(study, trial.number)
        if series is not None:
            error.args = (
                f"{series}, so the study ends. The last one, trial {trial.number}: {reason} {hint}"
                "`optimize(..., catch=(TrialCrashed,))` continues anyway.",
            )
        elif self.options.on_crash == "fail":
            return crash_value(reason, len(study.directions))
        raise error

    def _end_without_value(self, reason: str, error: BaseException) -> Any:
        """Return the value of a trial without a result if ``optimize`` runs it, else raise."""
        study, trial = self.study, self.trial
        if study is None or not isinstance(trial, Trial) or not _optuna.is_run_by_optimize(trial):
            raise error
        return crash_value(reason, len(study.directions))

    def _add_usage(self, server: Server) -> ExitReport:
        """Record the usage of a trial whose process has ended; the larger figures count."""
        report, outcome = server.exit, server.outcome
        assert report is not None
        if report.stuck:
            _logger.warning(f"Trial {self.trial.number}: {report.stuck}")
        gpu_memory = None if outcome is None else outcome.gpu_memory
        if gpu_memory is not None and self.monitor.gpu is None:
            self.monitor.gpu = GpuUse("framework")
        self.monitor.add_usage(
            Usage(memory=report.memory, cpu_time=report.cpu_time, gpu_memory=gpu_memory)
        )
        self.monitor.record_unseen_peak(report.unseen_memory)
        return report

    def _return(self, value: Any, report: ExitReport, server: Server) -> Any:
        failed = server.failed_allocation
        if failed is not None and failed.resource == "memory" and _has_nan(value):
            # A search records a fit that failed as NaN, with a warning.
            breach = self._find_memory_breach(failed, report, server)
            if breach is not None:
                self._terminate(breach)
        if report.leftovers:
            _logger.warning(
                f"Trial {self.trial.number} left processes behind, which were killed: "
                f"{', '.join(report.leftovers)}."
            )
        return value

    def _raise(self, outcome: messages.Raised, report: ExitReport, server: Server) -> Any:
        error, failed = unpack_error(outcome.error), outcome.failed_allocation
        if report.cgroup_oom_kills:
            # A worker was killed in the trial's control group; that may cause any error.
            self._terminate_at_limit(report, cause=error)
        breach = None
        if failed is not None and failed.resource == "gpu_memory":
            return self._end_for_gpu(failed, error, report)
        if failed is not None:
            breach = self._find_memory_breach(failed, report, server)
        if (
            breach is None
            and isinstance(error, LimitBreached)
            and (error.resource, error.limit) == ("cpu_time", None)
        ):
            # Raised on the kernel's signal, which has no figures.
            used = self.monitor.usage().cpu_time or 0.0
            breach = find_refused_breach(
                "cpu_time", used, *self._ceilings(), share=0.0, refused=False
            )
        if breach is not None:
            self._terminate(breach, cause=error)
        return self._fail(error, report)

    def _fail(self, error: BaseException, report: ExitReport) -> Any:
        if not isinstance(error, ScriptFailed):
            raise error
        return self.crash(replace(report, exitcode=error.exitcode), str(error), hint="")

    def _find_memory_breach(
        self, failed: messages.FailedAllocation, report: ExitReport, server: Server
    ) -> Breach | None:
        enforced = server.ready is not None and server.ready.data_limit is not None
        return out_of_memory.find_memory_breach(
            failed, report.memory, *self._ceilings(), enforced=enforced
        )

    def _terminate_at_limit(self, report: ExitReport, cause: BaseException | None = None) -> None:
        breach = out_of_memory.find_breach_at_exit(
            report, *self._ceilings(), strict_memory=self.options.strict_memory
        )
        if breach is not None:
            self._terminate(breach, cause=cause)

    def _ceilings(self) -> tuple[Ceilings, float]:
        """Return the ceilings in force, and the seconds that the trial has taken."""
        return self.monitor.hard_ceilings, self.monitor.elapsed

    def _end_for_gpu(
        self, failed: messages.FailedAllocation, error: BaseException, report: ExitReport
    ) -> Any:
        """End a trial that got no GPU memory; ``optimize`` continues if others had taken it."""
        monitor = self.monitor
        size = device_memory({**os.environ, **monitor.environment})
        peak = monitor.usage().gpu_memory
        state = out_of_memory.read_gpu_memory_state(failed, peak, self._gpu_devices, size)
        breach = out_of_memory.find_gpu_breach(state, *self._ceilings())
        if breach is not None:
            self._terminate(breach, cause=error)
        reason = out_of_memory.describe_full_gpu(state, error)
        if reason is None or isinstance(error, TrialPruned):
            return self._fail(error, report)
        monitor.verdict = Verdict("failed", reason)
        if self.options.on_crash == "raise":
            raise error
        value = self._end_without_value(reason, error)
        self._try_again_elsewhere(state)
        return value

    def _try_again_elsewhere(self, state: out_of_memory.GpuMemoryState) -> None:
        """Enqueue a trial again whose assigned GPU was full, if other GPUs have room."""
        study, trial = self.study, self.trial
        assigned = self.monitor.environment.get("CUDA_VISIBLE_DEVICES")
        if assigned is None or study is None or not isinstance(trial, Trial):
            return
        need = (state.held_there or 0.0) + (state.requested or 0.0)
        with_room = [free for free in free_memory(os.environ) if free >= need]
        if len(with_room) < len(assigned.split(",")):
            return
        row = read_row(study, trial)
        try:
            trials = retry(lambda: study.get_trials(deepcopy=False))
            first = _optuna.first_attempt(row)
            if sum(_optuna.first_attempt(each) == first for each in trials) <= _MAX_GPU_RETRIES:
                enqueue_again(study, row, "found its GPU full of others' memory")
        except Exception as error:  # noqa: BLE001 - any backend's own; the study continues
            _logger.info(f"Trial {trial.number} could not be enqueued again: {error!r}.")

    def _terminate(
        self, breach: Breach, cause: BaseException | None = None, *, killed: bool = False
    ) -> NoReturn:
        self.monitor.breach = self.monitor.breach or breach
        if self.study is not None:
            tolerate_constraints_failure(self.study, self.trial, self.monitor)
        reason, elapsed = breach.reason, self.monitor.elapsed
        if elapsed - breach.seconds > _LONG_END:
            ended = "was killed" if killed else "ended"
            reason += f" The trial {ended} after {format_seconds(elapsed)}."
        self.monitor.verdict = Verdict("terminated", reason, breach)
        raise breach_error(breach, reason) from cause


def _has_nan(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, float) and math.isnan(v) for v in values)


# How a process ended.


def describe_exit(report: ExitReport) -> str:
    code = report.exitcode
    if report.stuck and code is None:
        return report.stuck
    if report.killer == "stopped":
        return "The trial's process was stopped by SIGSTOP and not continued, so it was killed."
    if report.killer == "request":
        return "The trial's process was killed because the study was interrupted."
    if code is None:
        return "The trial's process and its supervisor were killed from outside."
    if code < 0:
        return _describe_signal(-code, report)
    if code == 0:
        return "The trial's process ended by itself, with exit code 0, before it gave a result."
    return f"The trial's process ended by itself with exit code {code}."


def _describe_signal(number: int, report: ExitReport) -> str:
    name = format_signal(number)
    if name == "SIGKILL" and (report.oom_kills or report.cgroup_oom_kills):
        used = format_amount("memory", report.memory)
        return (
            f"The trial's process was killed by the kernel's out-of-memory killer; it had used "
            f"{used}."
        )
    if name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"):
        return f"The trial's process was killed from outside ({name})."
    meaning = (signal.strsignal(number) or "a signal").lower() if name.startswith("SIG") else ""
    if not meaning:
        return f"The trial's process was ended by {name}."
    # Rarely an error of the program: a page of a mapped file could not be read.
    hint = ", as where /dev/shm or a disk is full (in a container, see --shm-size)"
    return f"The trial's process crashed: {meaning} ({name}){hint if name == 'SIGBUS' else ''}."


# Crashes.


class CrashValue(float):
    """The value of a trial without a result: ``optimize`` fails the trial and continues.

    An exception would end ``optimize``, unless its caller catches it. It is a number, so that
    wrappers of an objective, such as a minus sign, work. Optuna's log shows the reason: "The value
    nan (the trial's process …) is not acceptable."
    """

    def __new__(cls, reason: str) -> CrashValue:
        return super().__new__(cls, math.nan)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __format__(self, spec: str) -> str:
        if spec:
            return super().__format__(spec)
        return f"nan ({self.reason[:1].lower()}{self.reason[1:].removesuffix('.')})"


def crash_value(reason: str, n_values: int) -> Any:
    value = CrashValue(reason)
    return value if n_values == 1 else (value, *[math.nan] * (n_values - 1))


def record_crash(study: Study, trial: Trial) -> None:
    """Write into a trial's row that its process crashed; a storage error is logged."""
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    try:
        write_attributes(storage, trial_id, system={CRASHED: trial.number})
    except Exception as error:  # noqa: BLE001 - any backend's own; the study continues
        _logger.info(f"The crash of trial {trial.number} could not be recorded: {error!r}.")


def find_crash_series(study: Study, number: int) -> str | None:
    """Return which trials in a row have crashed, including this one; None if too few.

    Crashes are counted over the rows of the study, not in this process: a job array runs one trial
    in each process, and a resumed study continues the count.
    """
    try:
        trials = retry(lambda: study.get_trials(deepcopy=False))
    except Exception as error:  # noqa: BLE001 - any backend's own; the study continues
        _logger.info(f"Crashed trials could not be counted: {error!r}.")
        return None
    begun = [t for t in trials if t.state != TrialState.WAITING and not is_rejected(t.user_attrs)]
    statuses: list[CrashStatus] = [
        "crashed" if t.number == number else _crash_status(t) for t in begun
    ]
    return describe_crash_series(statuses, [t.number for t in begun].index(number))


def _crash_status(trial: FrozenTrial) -> CrashStatus:
    unfinished = trial.state in (TrialState.RUNNING, TrialState.FAIL)
    # A retried trial has a copy of the crashed trial's attribute, with that one's number.
    if unfinished and trial.system_attrs.get(CRASHED) == trial.number:
        return "crashed"
    return "ended" if trial.state.is_finished() else "running"


def describe_crash_series(statuses: Sequence[CrashStatus], index: int) -> str | None:
    """Return which trials in a row have crashed, None if too few.

    The statuses are those of the trials that have begun; the one at ``index`` has just crashed.
    """
    in_a_row = 1
    for side in (reversed(statuses[:index]), statuses[index + 1 :]):
        in_a_row += len(list(itertools.takewhile(lambda status: status == "crashed", side)))
    if in_a_row >= CRASHES_IN_A_ROW:
        return f"{in_a_row} trials in a row have crashed"
    first = statuses[:FIRST_CRASHES]
    if len(first) == FIRST_CRASHES and set(first) == {"crashed"} and "ended" not in statuses:
        return f"The first {statuses.count('crashed')} trials of the study have crashed"
    return None
