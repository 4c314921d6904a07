"""Run one isolated trial, in the study's process: start it, serve its calls, record its result."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import logging
from typing import Any

from optuna import TrialPruned
from optuna.study import Study
from optuna.trial import BaseTrial, Trial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.active_trials import resolve_cores
from optuna_quota._enforcement.forecast import (
    completed_trials,
    CompletedTrials,
    forecast_breach,
    record_pace,
)
from optuna_quota._enforcement.nesting import (
    agreed_limits,
    pruner_limits,
    pruner_meters,
    quota_pruners,
)
from optuna_quota._enforcement.preemption import Preemption, preemption_of
from optuna_quota._enforcement.pruner import record_breach, rejection_error, wrap_nesting_pruner
from optuna_quota._enforcement.study_warnings import warn_of_ceilings, warn_of_unapplied, warn_once
from optuna_quota._enforcement.trial_result import read_row, record_result
from optuna_quota._isolation import messages
from optuna_quota._isolation.child import is_in_preparation
from optuna_quota._isolation.cores import core_pool, Cores
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.launch import CannotStart, IsolationOptions, TrialLauncher
from optuna_quota._isolation.module_state import describe_lost_changes
from optuna_quota._isolation.outcome import INTERRUPTED, OutcomeResolver
from optuna_quota._isolation.rpc import RemoteObjects
from optuna_quota._isolation.server import NotStarted, Server
from optuna_quota._limits import Limits, with_cores
from optuna_quota._metering import key_of, metering_loop, TrialMonitor, Verdict
from optuna_quota._records import is_rejected
from optuna_quota._resources import CLOCK_RESOURCES, format_amount
from optuna_quota._storage_retry import survive_outages, without_retries
from optuna_quota._usage import Breach
from optuna_quota.exceptions import LimitBreached, TrialPreempted


_logger = logging.getLogger("optuna.quota.isolated")

# The two places where limits may be given.
_PLACES = "isolated and of the study"
_ATTEMPTS = 3
_NOT_STARTED = (
    f"The trial's processes ended {_ATTEMPTS} times before its objective began. Something kills "
    "them, or the machine is short of memory or of process ids."
)
# Seconds that a trial without a limit on time may take to exit once it has its result.
_LONGEST_END = 60.0


class TrialRun:
    """Runs one trial in a process of its own."""

    def __init__(
        self,
        bind: Callable[[BaseTrial], Callable[..., Any]],
        options: IsolationOptions,
        trial: BaseTrial,
    ) -> None:
        self._bind = bind
        self._options = options
        self._trial = trial
        self._study = trial.study if isinstance(trial, Trial) else None
        self._preemption = Preemption() if self._study is None else preemption_of(self._study)
        self._trial_id = -1 if self._study is None else _optuna.trial_id_of(trial)
        self._forecast = _StepForecast(self._study) if options.predictive_stop else None
        self._server: Server
        # Why it was preempted, and how its row was finished from outside.
        self._stopped_for: str | None = None
        self._ended_outside: str | None = None

    def run(self) -> Any:
        if is_rejected(self._trial.user_attrs):
            raise rejection_error(self._trial.user_attrs)
        if is_in_preparation():
            raise RuntimeError(
                "An isolated trial was about to start in a process that is only importing the "
                "modules it needs: it would run the study again. Put what runs the study under "
                '`if __name__ == "__main__":`.'
            )
        self._monitor, owned = self._find_monitor()
        if owned:
            # Without a QuotaSampler, any deadline is that of an earlier sampler.
            self._preemption.forget_deadline()
        self._resolver = OutcomeResolver(self._trial, self._study, self._monitor, self._options)
        # The time to start the trial counts; the memory of this process does not.
        self._monitor.detach()
        if self._study is not None:
            survive_outages(_optuna.storage_of(self._study))
            _optuna.tolerate_finished_row(self._study, self._trial_id)
        value, error = None, None
        try:
            with core_pool.claim(self._monitor.limits.amounts().get("cpu_cores")) as cores:
                self._monitor.confine()
                value = self._run(cores)
        except BaseException as raised:
            error = raised
            if isinstance(raised, KeyboardInterrupt) and self._monitor.verdict is None:
                self._monitor.verdict = Verdict("failed", INTERRUPTED)
            raise
        finally:
            if owned:
                self._record(value, error)
        return value

    def _find_monitor(self) -> tuple[TrialMonitor, bool]:
        """Return the trial's monitor, and whether to record its result here."""
        loop = metering_loop()
        own = self._options.limits
        if self._study is None:
            key = (id(self._trial), self._trial.number)
            limits = resolve_cores(own or Limits())
            return loop.monitor(key, limits=limits, here=False), True
        key = key_of(self._study, self._trial)
        wrap_nesting_pruner(self._study)
        pruners = quota_pruners(self._study.pruner)
        limits = resolve_cores(agreed_limits(own, pruner_limits(pruners), _PLACES))
        monitor = loop.find(key)
        if monitor is None:
            is_preemptible = bool(self._preemption.signals)
            warn_of_ceilings(self._study, limits, has_purpose=is_preemptible or not pruners)
            if isinstance(self._trial, Trial) and _optuna.is_run_by_optimize(self._trial):
                warn_of_unapplied(self._study, limits)
            meters = pruner_meters(pruners)
            return loop.monitor(key, limits=limits, meters=meters, here=False), True
        own = None if own is None else resolve_cores(with_cores(own, monitor.limits.cpu_cores))
        if own is not None and monitor.limits != own:
            agreed_limits(own, monitor.limits, _PLACES)
            monitor.limit(own)
        return monitor, monitor.owner != "sampler"

    def _run(self, cores: Cores | None) -> Any:
        objective = self._bind(self._trial)
        for attempt in range(_ATTEMPTS):
            try:
                server = self._start_and_serve(objective, cores)
                break
            except CannotStart as error:
                return self._resolver.crash(
                    messages.ExitReport(exitcode=None), str(error), hint=""
                )
            except NotStarted:
                # The fork server had ended, or the processes that it had ready were killed.
                fork_server_client().reset()
                if attempt == _ATTEMPTS - 1:
                    return self._resolver.crash(messages.ExitReport(exitcode=None), _NOT_STARTED)
        outcome = server.outcome
        if outcome is not None and self._options.start_method == "forkserver":
            fork_server_client().learn(outcome.late_imports)
        if outcome is not None and outcome.changed and self._study is not None:
            text = describe_lost_changes(self._trial.number, outcome.changed)
            warn_once(self._study, "changes", text)
        if self._ended_outside is not None:
            return self._resolver.end_finished_outside(server, self._ended_outside)
        reason = self._stopped_for or self._preemption.reason
        if reason is not None and self._resolver.has_ended_early(server):
            return self._resolver.preempt(server, reason, self._options.grace_period)
        value = self._resolver.resolve(server)
        if self._forecast is not None and isinstance(outcome, messages.Returned):
            self._forecast.remember()
        return value

    def _start_and_serve(self, objective: Callable[..., Any], cores: Cores | None) -> Server:
        trial, closing = self._trial, contextlib.closing
        with contextlib.ExitStack() as stack:
            try:
                remote = stack.enter_context(closing(RemoteObjects(trial)))
                launcher = TrialLauncher(
                    objective, self._options, trial, self._monitor, remote, cores
                )
                connections = stack.enter_context(closing(launcher.launch()))
                server = Server(connections, remote, self, label=f"Trial {trial.number}")
            except OSError as error:  # no error of the objective
                raise CannotStart(error) from error
            stack.callback(server.close)
            self._server = server
            # Until the objective begins, only time counts.
            self._monitor.on_breach(self._stop_for_time)
            try:
                with self._preemption.handled_by(
                    self._trial_id, self._preempt, server.kill_soon, self._options.grace_period
                ):
                    launcher.begin(connections)
                    server.serve()
            except KeyboardInterrupt:
                self._interrupt(server)
                # As in plain Optuna, an objective may catch it and return a value.
                outcome = server.outcome
                if not (isinstance(outcome, messages.Returned) and outcome.stop_requested):
                    raise
                self._monitor.verdict = None
            except BaseException:
                server.kill()
                raise
        return server

    def _interrupt(self, server: Server) -> None:
        """Give an interrupted trial its grace period; a second interrupt kills it."""
        grace_period = self._options.grace_period
        self._monitor.verdict = Verdict("failed", INTERRUPTED)
        if grace_period > 0:
            _logger.warning(
                f"Trial {self._trial.number} was interrupted: it has {grace_period:g} s to end "
                "by itself. Another Ctrl-C kills it."
            )
        try:
            server.stop(KeyboardInterrupt(), grace_period)
            with contextlib.suppress(NotStarted):
                server.serve()
        except BaseException:
            server.kill()
            raise
        self._resolver.end_interrupted(server)

    def _record(self, value: Any, error: BaseException | None) -> None:
        if self._study is None or self._ended_outside is not None:
            self._monitor.close()
            return
        state = _stored_state(value, error, len(self._study.directions))
        reported = error if isinstance(error, Exception) else None
        assert isinstance(self._trial, Trial)
        row = read_row(self._study, self._trial)
        record_result(self._study, row, self._monitor, state, error=reported)

    # Called by the server while the trial runs.

    def on_ready(self, ready: messages.Ready) -> None:
        ceiling = self._monitor.hard_ceilings.get("memory")
        if ready.supervisor is not None and ceiling is not None:
            self._monitor.supervised = ceiling.limit
        # If it has already ended, its supervisor reports everything.
        with contextlib.suppress(ProcessLookupError):
            self._monitor.attach(ready.pid, ready.supervisor, self._options.outsiders)
        self._monitor.on_breach(self._stop)

    def on_report(self, step: int) -> None:
        if self._forecast is not None:
            breach = self._forecast.find_breach(step, self._monitor)
            if breach is not None:
                self._stop(breach)

    def on_outcome(self) -> float:
        """Stop checking for breaches; return the seconds in which the process has to end."""
        self._monitor.finish()
        ceilings, elapsed = self._monitor.hard_ceilings, self._monitor.elapsed
        left = [ceilings[name][0] - elapsed for name in CLOCK_RESOURCES if name in ceilings]
        return max(0.0, min(left, default=_LONGEST_END)) + self._options.grace_period

    def find_breach(self) -> Breach | None:
        return record_breach(self._monitor)

    def measure_gpus(self) -> None:
        self._resolver.measure_gpus()

    def check_row(self) -> None:
        """Stop the trial if its row was finished from outside, such as by optuna-dashboard."""
        if self._study is None or self._ended_outside is not None:
            return
        try:
            with without_retries():
                end = _optuna.describe_end(self._study, self._trial_id)
        except Exception as error:  # noqa: BLE001 - any backend's own; the trial goes on
            _logger.debug(f"The row of trial {self._trial.number} could not be read: {error!r}.")
            return
        if end is not None:
            self._ended_outside = end
            _logger.warning(f"Trial {self._trial.number} is stopped. {end}")
            self._server.stop(LimitBreached(end), self._options.grace_period)

    def _stop_for_time(self, breach: Breach) -> None:
        if breach.resource in CLOCK_RESOURCES:
            if self._study is not None and not breach.quota and self._server.ready is None:
                warn_once(
                    self._study,
                    "start",
                    f"Trial {self._trial.number} reached a limit of "
                    f"{format_amount(breach.resource, breach.limit)} on time before its objective "
                    "began: starting a trial's process counts. Allow for it.",
                )
            self._stop(breach)

    def _preempt(self, reason: str) -> None:
        self._stopped_for = self._stopped_for or reason
        grace_period = self._preemption.grace(self._options.grace_period)
        self._server.stop(TrialPreempted(reason), grace_period)

    def _stop(self, breach: Breach) -> None:
        self._server.stop(breach, self._options.grace_period)


class _StepForecast:
    """Predicts breaches from the times of a trial's intermediate values."""

    def __init__(self, study: Study | None) -> None:
        self._study = study
        self._steps: list[tuple[int, float]] = []
        self._next = 0

    def find_breach(self, step: int, monitor: TrialMonitor) -> Breach | None:
        elapsed = monitor.elapsed
        self._steps.append((step, elapsed))
        if len(self._steps) < self._next:
            return None
        # A forecast takes all steps into account, so with many steps it is rarer.
        self._next = 1 + int(1.01 * len(self._steps))
        return forecast_breach(
            monitor.hard_ceilings,
            elapsed,
            steps=self._steps,
            completed=self._completed,
            memory=monitor.timeline(),
        )

    def remember(self) -> None:
        if self._steps and self._study is not None:
            record_pace(self._study, self._steps)

    @functools.cached_property
    def _completed(self) -> CompletedTrials:
        return CompletedTrials() if self._study is None else completed_trials(self._study)


def _stored_state(value: Any, error: BaseException | None, n_values: int) -> TrialState:
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
