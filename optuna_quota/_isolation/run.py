"""One isolated trial from its start to its verdict, in the study's process."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import functools
import logging
import math
import os
from pathlib import Path
from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING

from optuna import TrialPruned
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.check import raise_breached
from optuna_quota._enforcement.check import raise_rejected
from optuna_quota._enforcement.check import record_breach
from optuna_quota._enforcement.constraints import tolerate_constraints_failure
from optuna_quota._enforcement.forecast import completed_trials
from optuna_quota._enforcement.forecast import CompletedTrials
from optuna_quota._enforcement.forecast import forecast_breach
from optuna_quota._enforcement.forecast import record_pace
from optuna_quota._enforcement.nesting import pruner_limits
from optuna_quota._enforcement.nesting import pruner_meters
from optuna_quota._enforcement.pruner import wrap_nesting_pruner
from optuna_quota._enforcement.trial_result import read_row
from optuna_quota._enforcement.trial_result import record_result
from optuna_quota._isolation import cgroup
from optuna_quota._isolation import processes
from optuna_quota._isolation.calls import RemoteObjects
from optuna_quota._isolation.child import Exited
from optuna_quota._isolation.child import Inherited
from optuna_quota._isolation.child import Raised
from optuna_quota._isolation.child import Ready
from optuna_quota._isolation.child import Returned
from optuna_quota._isolation.child import Start
from optuna_quota._isolation.child import Unsendable
from optuna_quota._isolation.child_trial import TrialFacts
from optuna_quota._isolation.control import BeginMonitoring
from optuna_quota._isolation.crashes import find_crash_series
from optuna_quota._isolation.crashes import note_crash
from optuna_quota._isolation.crashes import value_of_crash
from optuna_quota._isolation.ending import Ended
from optuna_quota._isolation.ending import find_breach_in_death
from optuna_quota._isolation.ending import find_breach_in_shortage
from optuna_quota._isolation.ending import find_breach_in_stop
from optuna_quota._isolation.ending import name_death
from optuna_quota._isolation.environment import read_context
from optuna_quota._isolation.gpu_shortage import find_gpu_breach
from optuna_quota._isolation.gpu_shortage import name_bad_luck
from optuna_quota._isolation.gpu_shortage import read_gpu_shortage
from optuna_quota._isolation.launch import can_supervise
from optuna_quota._isolation.launch import launch_fork
from optuna_quota._isolation.launch import Launched
from optuna_quota._isolation.main_module import find_main_module
from optuna_quota._isolation.main_module import MainModule
from optuna_quota._isolation.multiprocessing_child import is_in_preparation
from optuna_quota._isolation.output import prepare_logging
from optuna_quota._isolation.output import read_output_settings
from optuna_quota._isolation.pickling import dump_objective
from optuna_quota._isolation.pickling import NeedsFork
from optuna_quota._isolation.pickling import Payload
from optuna_quota._isolation.portable import launch_portable
from optuna_quota._isolation.remote_errors import unpack_error
from optuna_quota._isolation.serving import NotStarted
from optuna_quota._isolation.serving import Server
from optuna_quota._isolation.shortage import Shortage
from optuna_quota._isolation.template_client import PreparedMain
from optuna_quota._isolation.template_client import template_client
from optuna_quota._metering import key_of
from optuna_quota._metering import metering_loop
from optuna_quota._metering import Verdict
from optuna_quota._metering.gpu_attribution import DeviceShare
from optuna_quota._metering.gpu_attribution import GpuUse
from optuna_quota._metering.visible_gpus import device_memory
from optuna_quota._records import is_rejected
from optuna_quota._resources import Breach
from optuna_quota._resources import CLOCK_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage
from optuna_quota.exceptions import LimitBreached
from optuna_quota.exceptions import TrialCrashed


if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from optuna_quota._isolation.isolated import Isolated
    from optuna_quota._metering import TrialMonitor


_logger = logging.getLogger("optuna.quota.isolated")


class _CannotStart(Exception):
    """No template can be started, which was tried again already."""


class TrialRun:
    """Runs one trial in a process of its own.

    Args:
        isolated: The objective and how to run it.
        trial: The trial.
    """

    def __init__(self, isolated: Isolated, trial: BaseTrial) -> None:
        self._isolated = isolated
        self._trial = trial
        self._study = trial.study if isinstance(trial, Trial) else None
        self._remote = RemoteObjects(trial)
        self._steps: list[tuple[int, float]] = []
        self._next_forecast = 0
        self._server: Server | None = None
        self._gpu_devices: tuple[DeviceShare, ...] = ()

    def run(self) -> Any:
        """Run it; return what the objective returns or raise what it raises."""
        if is_rejected(self._trial.user_attrs):
            raise_rejected(self._trial.user_attrs)
        if is_in_preparation():
            raise RuntimeError(
                "An isolated trial was about to start in a process that is only importing the "
                "modules it needs: it would run the study again. Put what runs the study under "
                '`if __name__ == "__main__":`.'
            )
        self._watch, owned = self._find_watch()
        # From here on its start counts, but not what this process and its template hold.
        self._watch.detach()
        error: BaseException | None = None
        value: Any = None
        try:
            value = self._run()
        except BaseException as raised:
            error = raised
            if isinstance(raised, KeyboardInterrupt) and self._watch.verdict is None:
                reason = "The study was interrupted (KeyboardInterrupt)."
                self._watch.verdict = Verdict("failed", reason)
            raise
        finally:
            if owned:
                self._settle(value, error)
        return value

    def _find_watch(self) -> tuple[TrialMonitor, bool]:
        """Return the trial's metering, and whether it is for us to settle."""
        loop = metering_loop()
        if self._study is None:
            key = (id(self._trial), self._trial.number)
            limits = self._isolated.limits or Limits()
            return loop.monitor(key, limits=limits, here=False), True
        key = key_of(self._study, self._trial)
        wrap_nesting_pruner(self._study)
        pruner = self._study.pruner
        limits = agreed_limits(self._isolated.limits, pruner_limits(pruner))
        watch = loop.find(key)
        if watch is None:
            meters = pruner_meters(pruner)
            return loop.monitor(key, limits=limits, meters=meters, here=False), True
        if self._isolated.limits is not None and watch.limits != self._isolated.limits:
            agreed_limits(self._isolated.limits, watch.limits or None)
            watch.limit(self._isolated.limits)
        return watch, watch.owner != "sampler"

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if self._study is None:
            self._watch.close()
            return
        state = _state_of(value, error, len(self._study.directions))
        reported = error if isinstance(error, Exception) else None
        assert isinstance(self._trial, Trial)
        row = read_row(self._study, self._trial)
        record_result(self._study, row, self._watch, state, error=reported)

    def _run(self) -> Any:
        for attempt in range(3):
            try:
                server = self._serve()
                break
            except NotStarted as error:
                # The template had ended, or the processes that it had ready were killed.
                template_client().lost()
                if attempt == 2:
                    return self._crash(Ended(exitcode=None), str(error))
            except _CannotStart as error:
                return self._crash(Ended(exitcode=None), str(error))
        return self._conclude(server)

    def _serve(self) -> Server:
        launched, start, payload = self._launch()
        self._server = server = Server(
            launched,
            self._remote,
            on_ready=self._on_ready,
            on_report=self._on_report,
            on_outcome=self._on_outcome,
            ask_breach=lambda: record_breach(self._watch),
            measure=self._measure,
            label=f"Trial {self._trial.number}",
        )
        # The start counts as well; this process's own memory does not.
        self._watch.on_breach(self._stop_early)
        try:
            with contextlib.suppress(ConnectionError):
                if start is not None:
                    launched.control.send(self._order())
                    launched.channel.send(start)
                if payload is not None:
                    payload.send_buffers(launched.channel)
            # While the trial runs, it alone holds what was sent to it.
            del start, payload
            server.serve()
        except KeyboardInterrupt:
            self._let_finish(server)
            raise
        except BaseException:
            server.kill()
            raise
        finally:
            launched.close()
        return server

    def _let_finish(self, server: Server) -> None:
        """Give an interrupted trial its grace period; a second interrupt ends it at once."""
        grace_period = self._isolated.grace_period
        reason = "The study was interrupted (KeyboardInterrupt)."
        self._watch.verdict = Verdict("failed", reason)
        if grace_period > 0:
            _logger.warning(
                f"Trial {self._trial.number} was interrupted: it has {grace_period:g} s to end "
                "by itself. Another Ctrl-C kills it."
            )
        try:
            server.interrupt(grace_period)
            with contextlib.suppress(NotStarted):
                server.serve()
        except BaseException:
            server.kill()
            raise
        if server.ended is None:
            return
        self._take_usage(server.ended, None)
        if server.ended.killer is not None:
            reason = (
                f"{reason} The trial took longer than {grace_period:g} s to end: it was killed."
            )
            self._watch.verdict = Verdict("failed", reason)

    def _launch(self) -> tuple[Launched, Start | None, Payload | None]:
        """Start the processes; return what is to be sent, None where they inherited it."""
        method = self._isolated.start_method
        if method == "fork" and can_supervise():
            return self._launch_fork(), None, None
        if not can_supervise():
            bare = PreparedMain(find_main_module().without_statements(), is_made=False)
            payload = dump_objective(self._isolated.objective, self._remote, bare.module)
            return launch_portable(), self._start(payload, bare), payload
        client = template_client()
        if method == "spawn":
            client = client.for_one_trial()
        before = self._watch.elapsed
        try:
            main = client.prepare(self._isolated.preload)
            payload = dump_objective(self._isolated.objective, self._remote, main.module)
            launched = client.launch(_delegated_cgroup(), payload.descriptors)
        except NeedsFork:
            # As multiprocessing itself would by default, where such a lock is made.
            if processes.uses_cuda():
                raise
            return self._launch_fork(), None, None
        except OSError as error:
            raise _CannotStart(f"The trial's process could not be started: {error}") from error
        finally:
            if method == "spawn":
                client.release()
        # What the template loaded first serves all trials; this one only came when it did.
        self._watch.detach(waited=self._watch.elapsed - before)
        return launched, self._start(payload, main), payload

    def _launch_fork(self) -> Launched:
        # Made before the fork: after it, each page that is touched here is copied.
        start = self._start(None, PreparedMain(MainModule(), is_made=True))
        inherited = Inherited(start, self._order(), self._isolated.objective)
        prepare_logging(reset=False)
        return launch_fork(_delegated_cgroup(), inherited)

    def _start(self, payload: Payload | None, main: PreparedMain) -> Start:
        trial, study = self._trial, self._study
        facts = TrialFacts(
            number=trial.number,
            trial_id=None if study is None else _optuna.trial_id_of(trial),
            datetime_start=trial.datetime_start,
            study=None if study is None else self._remote.handle(study),
        )
        return Start(
            context=read_context(self._watch.environment, main.module),
            has_main=main.is_made,
            output=read_output_settings(),
            trial=facts,
            limits={name: ceiling for name, (ceiling, _) in self._ceilings().items()},
            device_memory=self._device_memory() if "gpu_memory" in self._ceilings() else None,
            grace_period=self._isolated.grace_period,
            objective=None if payload is None else payload.pickles,
            buffers=() if payload is None else payload.sizes,
            strict_memory=self._isolated.strict_memory,
        )

    def _device_memory(self) -> float | None:
        return device_memory({**os.environ, **self._watch.environment})

    def _ceilings(self) -> Mapping[str, tuple[float, bool]]:
        # What is set but once goes by the most that could be granted: the metering loop holds
        # the slice of a quota.
        return self._watch.hard_ceilings

    def _order(self) -> BeginMonitoring:
        memory, quota = self._ceilings().get("memory", (None, False))
        return BeginMonitoring(
            self._isolated.grace_period,
            memory,
            quota,
            self._watch.elapsed,
            self._isolated.strict_memory,
            self._outsiders,
        )

    def _on_ready(self, ready: Ready) -> None:
        memory, _ = self._ceilings().get("memory", (None, False))
        self._watch.supervised = None if ready.supervisor is None else memory
        # It may have ended already: then there is nothing to meter, and its supervisor knows all.
        with contextlib.suppress(ProcessLookupError):
            self._watch.attach(ready.pid, ready.supervisor, self._outsiders)
        self._watch.on_breach(self._stop)

    @property
    def _outsiders(self) -> int:
        """How many processes hold what the trial was forked with, beside the trial.

        The template, the trial's supervisor, and the two that wait for the next trial.
        """
        return 4 if self._isolated.start_method == "forkserver" else 0

    def _on_outcome(self) -> float | None:
        """Let nothing be a breach from now on; return how long the process may take to end."""
        self._watch.finish()
        ceilings = self._ceilings()
        clocks = [ceilings[name][0] for name in CLOCK_RESOURCES if name in ceilings]
        if not clocks:
            return None
        return max(0.0, min(clocks) - self._watch.elapsed) + self._isolated.grace_period

    def _stop_early(self, breach: Breach) -> None:
        if breach.resource in CLOCK_RESOURCES:
            self._stop(breach)

    def _stop(self, breach: Breach) -> None:
        assert self._server is not None
        self._server.stop(breach, self._isolated.grace_period)

    def _on_report(self, step: int) -> None:
        if not self._isolated.predictive_stop:
            return
        elapsed = self._watch.elapsed
        self._steps.append((step, elapsed))
        if len(self._steps) < self._next_forecast:
            return
        # A forecast looks at all steps: of many, not after each.
        self._next_forecast = 1 + int(1.01 * len(self._steps))
        breach = forecast_breach(
            self._ceilings(),
            elapsed,
            steps=self._steps,
            completed=self._completed_trials,
            memory=self._watch.timeline(),
        )
        if breach is not None:
            self._stop(breach)

    @functools.cached_property
    def _completed_trials(self) -> CompletedTrials:
        return CompletedTrials() if self._study is None else completed_trials(self._study)

    def _conclude(self, server: Server) -> Any:
        """Return or raise what came of the trial, and put down the verdict."""
        ended, outcome = server.ended, server.outcome
        assert ended is not None
        self._take_usage(ended, getattr(outcome, "gpu_memory", None))
        if server.breach is not None:
            self._terminate(server.breach)
        if isinstance(outcome, Returned):
            if self._steps and self._study is not None:
                record_pace(self._study, self._steps)
            shortage = server.shortage
            of_memory = shortage is not None and shortage.resource == "memory"
            if shortage is not None and of_memory and _has_nan(outcome.value):
                # A search counts a fit that fails as NaN, and warns of why.
                breach = self._find_breach_in(shortage, ended)
                if breach is not None:
                    self._terminate(breach)
            if ended.leftovers:
                _logger.warning(
                    f"Trial {self._trial.number} left processes behind, which were ended: "
                    f"{', '.join(ended.leftovers)}."
                )
            return outcome.value
        if isinstance(outcome, Raised):
            return self._raise(outcome, ended)
        if isinstance(outcome, Unsendable):
            return self._crash(
                ended,
                f"The objective returned a value of type {outcome.kind} that can't be sent from "
                f"the trial's process: {outcome.reason}",
            )
        if isinstance(outcome, Exited):
            return self._crash(
                ended, f"The objective ended its process by sys.exit({outcome.code})."
            )
        self._terminate_at_limit(ended)
        return self._crash(ended, name_death(ended))

    def _take_usage(self, ended: Ended, gpu_memory: float | None) -> None:
        if gpu_memory is not None and self._watch.gpu is None:
            self._watch.gpu = GpuUse("framework")
        usage = Usage(memory=ended.memory, cpu_time=ended.cpu_time, gpu_memory=gpu_memory)
        self._watch.add_usage(usage)
        self._watch.record_unseen_peak(ended.unseen_memory)

    def _measure(self) -> None:
        """Read what the trial holds at the moment when an allocation on a GPU was refused."""
        self._watch.sample(fully=True)
        self._gpu_devices = () if self._watch.gpu is None else self._watch.gpu.devices

    def _raise(self, outcome: Raised, ended: Ended) -> Any:
        """Raise what the objective raised, or for the limit that was behind it."""
        error, shortage = unpack_error(outcome.error), outcome.shortage
        if ended.leaf_oom_kills:
            # A worker was killed in the trial's control group; what came of it is of any kind.
            self._terminate_at_limit(ended, cause=error)
        if shortage is not None and shortage.resource == "gpu_memory":
            return self._end_for_gpu(shortage, error)
        breach = None if shortage is None else self._find_breach_in(shortage, ended)
        if breach is None and isinstance(error, LimitBreached):
            used = self._watch.usage().cpu_time
            breach = find_breach_in_stop(error, used, self._ceilings(), self._watch.elapsed)
        if breach is not None:
            self._terminate(breach, cause=error)
        raise error

    def _find_breach_in(self, shortage: Shortage, ended: Ended) -> Breach | None:
        assert self._server is not None
        strict = self._isolated.strict_memory and self._server.data_limit is not None
        return find_breach_in_shortage(
            shortage, ended.memory, self._ceilings(), self._watch.elapsed, enforced=strict
        )

    def _terminate_at_limit(self, ended: Ended, cause: BaseException | None = None) -> None:
        """Terminate the trial where its process died at a limit of ours."""
        strict, elapsed = self._isolated.strict_memory, self._watch.elapsed
        breach = find_breach_in_death(ended, self._ceilings(), elapsed, strict_memory=strict)
        if breach is not None:
            self._terminate(breach, cause=cause)

    def _end_for_gpu(self, shortage: Shortage, error: BaseException) -> Any:
        """End a trial that got no GPU memory; ``optimize`` goes on when others had taken it."""
        known = read_gpu_shortage(
            shortage,
            self._watch.usage().gpu_memory,
            self._gpu_devices,
            self._device_memory(),
        )
        breach = find_gpu_breach(known, self._ceilings(), self._watch.elapsed)
        if breach is not None:
            self._terminate(breach, cause=error)
        reason = name_bad_luck(known, error)
        if reason is None or isinstance(error, TrialPruned):
            raise error
        self._watch.verdict = Verdict("failed", reason)
        trial, study = self._trial, self._study
        by_optimize = isinstance(trial, Trial) and _optuna.is_run_by_optimize(trial)
        if study is None or not by_optimize or self._isolated.on_crash == "raise":
            raise error
        return value_of_crash(reason, len(study.directions))

    def _terminate(self, breach: Breach, cause: BaseException | None = None) -> NoReturn:
        self._watch.breach = self._watch.breach or breach
        if self._study is not None:
            tolerate_constraints_failure(self._study, self._trial, self._watch)
        self._watch.verdict = Verdict("terminated", breach.reason, breach)
        if cause is None:
            raise_breached(breach)
        try:
            raise_breached(breach)
        except Exception as error:
            raise error from cause

    def _crash(self, ended: Ended, reason: str) -> Any:
        """Return the value of a crashed trial where ``optimize`` is to go on, else raise."""
        self._watch.verdict = Verdict("failed", reason)
        if ended.traceback:
            _logger.error(f"Trial {self._trial.number}: {reason}\n{ended.traceback}")
        error = TrialCrashed(reason, exitcode=ended.exitcode, traceback=ended.traceback)
        study, trial = self._study, self._trial
        if study is None or not isinstance(trial, Trial):
            raise error
        note_crash(study, trial)
        if not _optuna.is_run_by_optimize(trial):
            raise error
        series = find_crash_series(study, trial.number)
        if series is not None:
            error.args = (f"{series}, so the study ends. {_advice(trial.number, reason)}",)
        elif self._isolated.on_crash == "fail":
            return value_of_crash(reason, len(study.directions))
        raise error


def agreed_limits(own: Limits | None, theirs: Limits | None) -> Limits:
    """Return the limits in force.

    Args:
        own: Those given to :func:`~optuna_quota.isolated`.
        theirs: The pruner's or the sampler's.

    Raises:
        ValueError: If both have some and they disagree.
    """
    if own is not None and theirs is not None and own != theirs:
        raise ValueError(
            f"The limits of isolated and of the study must agree but got {own!r} and {theirs!r}. "
            "Give them to QuotaPruner alone."
        )
    return own or theirs or Limits()


def _has_nan(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, float) and math.isnan(v) for v in values)


def _advice(number: int, reason: str) -> str:
    return (
        f"The last one, trial {number}: {reason} Call the objective without `isolated` on "
        "`study.ask()` to see why; `optimize(..., catch=(TrialCrashed,))` goes on all the same."
    )


def _state_of(value: Any, error: BaseException | None, n_values: int) -> TrialState:
    """Return the state that Optuna is about to store."""
    if isinstance(error, TrialPruned):
        return TrialState.PRUNED
    if error is not None:
        return TrialState.FAIL
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        valid = [float(v) == float(v) for v in values]
    except (TypeError, ValueError):
        return TrialState.FAIL
    return TrialState.COMPLETE if all(valid) and len(valid) == n_values else TrialState.FAIL


@functools.cache
def _delegated_cgroup() -> Path | None:
    return cgroup.find_delegated(cgroup.own_cgroup())
