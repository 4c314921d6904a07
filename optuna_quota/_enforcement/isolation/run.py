"""One isolated trial from its start to its verdict, in the study's process."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import functools
import logging
import math
from pathlib import Path
from typing import Any
from typing import NoReturn
from typing import TYPE_CHECKING

from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement.check import condemn
from optuna_quota._enforcement.check import raise_breached
from optuna_quota._enforcement.check import raise_rejected
from optuna_quota._enforcement.forecast import forecast_breach
from optuna_quota._enforcement.isolation import cgroup
from optuna_quota._enforcement.isolation.child import Exited
from optuna_quota._enforcement.isolation.child import Inherited
from optuna_quota._enforcement.isolation.child import Raised
from optuna_quota._enforcement.isolation.child import Ready
from optuna_quota._enforcement.isolation.child import Returned
from optuna_quota._enforcement.isolation.child import Start
from optuna_quota._enforcement.isolation.child import Unsendable
from optuna_quota._enforcement.isolation.child_trial import TrialFacts
from optuna_quota._enforcement.isolation.control import Enforce
from optuna_quota._enforcement.isolation.control import Mind
from optuna_quota._enforcement.isolation.crashes import find_crash_series
from optuna_quota._enforcement.isolation.crashes import note_crash
from optuna_quota._enforcement.isolation.crashes import value_of_crash
from optuna_quota._enforcement.isolation.ending import Ended
from optuna_quota._enforcement.isolation.ending import find_breach_in_death
from optuna_quota._enforcement.isolation.ending import find_breach_in_shortage
from optuna_quota._enforcement.isolation.ending import name_death
from optuna_quota._enforcement.isolation.ending import name_gpu_shortage
from optuna_quota._enforcement.isolation.errors import unpack_error
from optuna_quota._enforcement.isolation.launch import can_supervise
from optuna_quota._enforcement.isolation.launch import launch_fork
from optuna_quota._enforcement.isolation.launch import Launched
from optuna_quota._enforcement.isolation.modules import can_preload
from optuna_quota._enforcement.isolation.modules import named_modules
from optuna_quota._enforcement.isolation.objectives import dump_objective
from optuna_quota._enforcement.isolation.objectives import Residents
from optuna_quota._enforcement.isolation.output import output_rules
from optuna_quota._enforcement.isolation.output import sounding_loggers
from optuna_quota._enforcement.isolation.plain import launch_plain
from optuna_quota._enforcement.isolation.serving import NotStarted
from optuna_quota._enforcement.isolation.serving import Server
from optuna_quota._enforcement.isolation.shortage import Shortage
from optuna_quota._enforcement.isolation.surroundings import surroundings
from optuna_quota._enforcement.isolation.template_client import template_client
from optuna_quota._enforcement.settle import row_of
from optuna_quota._enforcement.settle import settle
from optuna_quota._metering import key_of
from optuna_quota._metering import metering_loop
from optuna_quota._metering import Verdict
from optuna_quota._records import is_rejected
from optuna_quota._resources import Breach
from optuna_quota._resources import Limits
from optuna_quota._resources import Usage
from optuna_quota.exceptions import TrialCrashed


if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from optuna_quota._enforcement.isolated import Isolated
    from optuna_quota._metering import Watch


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
        self._residents = Residents(trial)
        self._steps: list[tuple[int, float]] = []
        self._server: Server | None = None

    def run(self) -> Any:
        """Run it; return what the objective returns or raise what it raises."""
        if is_rejected(self._trial.user_attrs):
            raise_rejected(self._trial.user_attrs)
        self._watch, owned = self._find_watch()
        # From here on its start counts, but not what this process and its template hold.
        self._watch.detach()
        error: BaseException | None = None
        value: Any = None
        try:
            value = self._run()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if owned:
                self._settle(value, error)
        return value

    def _find_watch(self) -> tuple[Watch, bool]:
        """Return the trial's metering, and whether it is for us to settle."""
        loop = metering_loop()
        if self._study is None:
            key = (id(self._trial), self._trial.number)
            limits = self._isolated.limits or Limits()
            return loop.watch(key, limits=limits, here=False), True
        key = key_of(self._study, self._trial)
        pruner = self._study.pruner
        limits = agreed_limits(self._isolated.limits, getattr(pruner, "limits", None))
        watch = loop.find(key)
        if watch is None:
            meters = getattr(pruner, "meters", ())
            return loop.watch(key, limits=limits, meters=meters, here=False), True
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
        row = row_of(self._study, self._trial)
        settle(self._study, row, self._watch, state, error=reported)

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
        launched, start = self._launch()
        self._server = server = Server(
            launched,
            self._residents,
            on_ready=self._on_ready,
            on_report=self._on_report,
            ask_breach=lambda: condemn(self._watch),
            label=f"Trial {self._trial.number}",
        )
        # The start counts as well; this process's own memory does not.
        self._watch.on_breach(self._stop_early)
        try:
            with contextlib.suppress(ConnectionError):
                launched.control.send(Mind(self._isolated.grace_period))
                if start is not None:
                    launched.channel.send(start)
            server.serve()
        except BaseException:
            # An interrupt (Ctrl-C): nothing of the trial may go on.
            server.kill()
            raise
        finally:
            launched.close()
        return server

    def _launch(self) -> tuple[Launched, Start | None]:
        """Start the processes; return what is to be sent, None where they inherited it."""
        method = self._isolated.start_method
        if method == "fork" and can_supervise():
            # Made before the fork: after it, each page that is touched here is copied.
            inherited = Inherited(self._start(None), self._isolated.objective, sounding_loggers())
            return launch_fork(_delegated_cgroup(), inherited), None
        objective = dump_objective(self._isolated.objective, self._residents)
        if not can_supervise():
            return launch_plain(), self._start(objective)
        client = template_client(once=method == "spawn")
        if method == "forkserver":
            client.want(can_preload(named_modules(objective)))
        before = self._watch.elapsed
        try:
            launched = client.launch(_delegated_cgroup())
        except OSError as error:
            raise _CannotStart(f"The trial's process could not be started: {error}") from error
        # What the template loaded first serves all trials; this one only came when it did.
        self._watch.detach(waited=self._watch.elapsed - before)
        return launched, self._start(objective)

    def _start(self, objective: bytes | None) -> Start:
        trial, study = self._trial, self._study
        facts = TrialFacts(
            number=trial.number,
            trial_id=None if study is None else _optuna.trial_id_of(trial),
            datetime_start=trial.datetime_start,
            study=None if study is None else self._residents.handle(study),
        )
        return Start(
            surroundings=surroundings(self._watch.environment),
            output=output_rules(),
            trial=facts,
            limits={name: ceiling for name, (ceiling, _) in self._ceilings().items()},
            device_memory=device_memory() if "gpu_memory" in self._ceilings() else None,
            grace_period=self._isolated.grace_period,
            objective=objective,
            strict_memory=self._isolated.strict_memory,
        )

    def _ceilings(self) -> Mapping[str, tuple[float, bool]]:
        # A grant of more of a quota does not reach the kernel: the metering loop holds the slice.
        return self._watch.hard_ceilings

    def _on_ready(self, ready: Ready) -> Enforce:
        memory, quota = self._ceilings().get("memory", (None, False))
        self._watch.supervised = None if ready.supervisor is None else memory
        # It may have ended already: then there is nothing to meter, and its supervisor knows all.
        with contextlib.suppress(ProcessLookupError):
            self._watch.retarget(ready.pid, ready.supervisor)
        self._watch.on_breach(self._stop)
        strict = self._isolated.strict_memory
        return Enforce(memory, quota, self._watch.elapsed, ready.data_limit, strict)

    def _stop_early(self, breach: Breach) -> None:
        if breach.resource in ("wall_time", "trial_time"):
            self._stop(breach)

    def _stop(self, breach: Breach) -> None:
        assert self._server is not None
        self._server.stop(breach, self._isolated.grace_period)

    def _on_report(self, step: int) -> None:
        if not self._isolated.predictive_stop:
            return
        elapsed = self._watch.elapsed
        self._steps.append((step, elapsed))
        breach = forecast_breach(
            self._ceilings(),
            elapsed,
            steps=self._steps,
            last_step=self._least_last_step(),
            memory=self._watch.timeline(),
        )
        if breach is not None:
            self._stop(breach)

    @functools.cache  # noqa: B019 - a run lives as long as its trial
    def _least_last_step(self) -> int | None:
        """Return the least last step of the trials that completed, None before three have."""
        if self._study is None:
            return None
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        steps = [step for trial in done if (step := trial.last_step) is not None]
        return min(steps) if len(steps) >= 3 else None

    def _conclude(self, server: Server) -> Any:
        """Return or raise what came of the trial, and put down the verdict."""
        ended, outcome = server.ended, server.outcome
        assert ended is not None
        self._take_usage(ended)
        if isinstance(outcome, (Returned, Raised)):
            template_client().want(outcome.modules)
        if server.breach is not None:
            self._terminate(server.breach)
        if isinstance(outcome, Returned):
            if server.shortage is not None and _has_nan(outcome.value):
                # A search counts a fit that fails as NaN, and warns of why.
                breach = self._find_breach_in(server.shortage, ended)
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

    def _take_usage(self, ended: Ended) -> None:
        self._watch.add_usage(Usage(memory=ended.memory, cpu_time=ended.cpu_time))
        self._watch.take_unseen_peak(ended.unseen_memory)

    def _raise(self, outcome: Raised, ended: Ended) -> Any:
        """Raise what the objective raised, unless a limit of ours or a full GPU was behind it."""
        error = unpack_error(outcome.error)
        if ended.leaf_oom_kills:
            # A worker was killed in the trial's control group; what came of it is of any kind.
            self._terminate_at_limit(ended, cause=error)
        shortage = outcome.shortage
        if shortage is None:
            raise error
        breach = self._find_breach_in(shortage, ended)
        if breach is not None:
            self._terminate(breach, cause=error)
        if shortage.resource != "gpu_memory" or device_memory() is None:
            raise error
        return self._fail(name_gpu_shortage(shortage, self._watch.usage().gpu_memory), error)

    def _find_breach_in(self, shortage: Shortage, ended: Ended) -> Breach | None:
        gpu = shortage.resource == "gpu_memory"
        assert self._server is not None
        strict = self._isolated.strict_memory and self._server.data_limit is not None
        return find_breach_in_shortage(
            shortage,
            self._watch.usage().gpu_memory if gpu else ended.memory,
            self._ceilings(),
            self._watch.elapsed,
            enforced=gpu or strict,
            device_memory=device_memory() if gpu else None,
        )

    def _terminate_at_limit(self, ended: Ended, cause: BaseException | None = None) -> None:
        """Terminate the trial where its process died at a limit of ours."""
        strict, elapsed = self._isolated.strict_memory, self._watch.elapsed
        breach = find_breach_in_death(ended, self._ceilings(), elapsed, strict_memory=strict)
        if breach is not None:
            self._terminate(breach, cause=cause)

    def _fail(self, reason: str, error: BaseException) -> Any:
        """Fail the trial for what it can't help; ``optimize`` goes on as after a crash."""
        self._watch.verdict = Verdict("failed", reason)
        is_optimized = isinstance(self._trial, Trial) and _optuna.is_run_by_optimize(self._trial)
        if self._study is None or not is_optimized or self._isolated.on_crash == "raise":
            raise error
        return value_of_crash(reason, len(self._study.directions))

    def _terminate(self, breach: Breach, cause: BaseException | None = None) -> NoReturn:
        self._watch.breach = self._watch.breach or breach
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


def device_memory() -> float | None:
    """Return the memory of the smallest visible GPU in bytes, None without one."""
    from optuna_quota._metering.nvml import GpuError
    from optuna_quota._metering.nvml import open_devices

    totals = []
    for device in open_devices()[0]:
        with contextlib.suppress(GpuError):
            totals.append(float(device.memory()[1]))
    return min(totals, default=None)


def _state_of(value: Any, error: BaseException | None, n_values: int) -> TrialState:
    """Return the state that Optuna is about to store."""
    from optuna import TrialPruned

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
