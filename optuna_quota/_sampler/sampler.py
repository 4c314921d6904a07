"""QuotaSampler: wraps a sampler and admits studies, trials and points within a quota."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
from functools import partial
import logging
import threading
import time
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import _optuna
from optuna_quota._enforcement import nesting
from optuna_quota._enforcement.preemption import enqueue_again
from optuna_quota._enforcement.pruner import QuotaPruner, wrap_nesting_pruner
from optuna_quota._enforcement.trial_result import (
    read_row,
    record_ignored_rejection,
    uniform_constraints,
)
from optuna_quota._footprint.user_given import as_footprint, by_value, from_value
from optuna_quota._ledger.heartbeat import LEASE
from optuna_quota._limits import Limits, Quota, Strategy
from optuna_quota._metering import check_names, key_of, Meter, metering_loop
from optuna_quota._projection.projection import Projection
from optuna_quota._sampler import options
from optuna_quota._sampler.candidates import CandidateFilter
from optuna_quota._sampler.integrations import adapt_tools
from optuna_quota._sampler.row_cleanup import (
    clear_copied_attributes,
    fail_unfinished_trial,
    finish_failed_row,
)
from optuna_quota._sampler.study_projection import admit_strategy, project_study
from optuna_quota._sampler.study_session import StudySession, StudySessions
from optuna_quota._units import Duration, parse_seconds
from optuna_quota._usage import Usage
from optuna_quota.exceptions import StudyRejected


_Draw = Callable[[CandidateFilter, Study], dict[str, Any]]

_logger = logging.getLogger("optuna.quota.sampler")

_PLACES = "QuotaSampler and QuotaPruner"
# Draws of a point while other workers reserve what was left for it.
_MOST_DRAWS = 4


class QuotaSampler(_optuna.StudyPart, BaseSampler):
    """Wraps another sampler and keeps the study inside a quota.

    Example:

        .. code-block:: python

            study = optuna.create_study(
                sampler=QuotaSampler(TPESampler(), quota=Quota(wall_time="2h", cpu_time="6h")),
                pruner=QuotaPruner(limits=Limits(memory="4GiB")),
            )
            study.optimize(objective, n_trials=200)

    Its options are final: to change one, give the study another QuotaSampler.

    Args:
        base_sampler: Any sampler; :class:`~optuna.samplers.TPESampler` by default.
        quota: Ceilings on the study, across all its workers; none by default, so that points are
            only held to the limits.
        strategy: What is about to run, to project it.
        footprint: What a trial is expected to use: a :class:`Usage`, a function from parameters
            to one, or a fitted model. Without one it is learned from the study's own trials. A
            function is called once for each point, and with complete points only: those with
            all parameters of the ``strategy``'s search space, or of a trial that completed.
        confidence: Probability, one-sided, with which what is admitted has to fit.
        deadline: When this worker has to be done: a duration from now on (seconds or text with its
            unit), a datetime, or ``"slurm"`` for the end of the SLURM job that it runs in. No
            trial starts that would most likely not be done by then, and ``optimize`` ends as on
            its ``timeout``. Running ones are stopped in time, an isolated one its grace period
            ahead, and enqueued again: see :func:`~optuna_quota.preemptible`.
        limits: Ceilings on each trial where no :class:`~optuna_quota.QuotaPruner` can be passed.
        meters: Meters of your own, where no QuotaPruner can be passed.
        on_exhausted: What ``optimize`` does once a total quota is used up: ``"stop"`` ends it as
            its ``timeout`` would, ``"raise"`` raises :class:`~optuna_quota.QuotaExhausted`. A
            further ``ask`` outside of ``optimize`` raises in either case.
        on_crowded: What a trial does where others on its host hold much of what all may hold
            together (``memory``, ``gpu_memory``, ``cpu_cores``): ``"wait"`` until there is room
            for it to start, or ``"smaller"``: once it may start, draw only a point that is
            projected to fit into what is free then.
        gpus_per_trial: Assign this many GPUs to each trial, those with the most room for its
            ``gpu_memory`` (an even part on each) among those that this process may use. An
            isolated trial sees no others (``CUDA_VISIBLE_DEVICES``). With None it sees all.
        one_gpu: The same as ``gpus_per_trial=1``.
        metering: False where trials run in processes that this one neither starts nor sees, as
            under Ray Tune, or in an ask-and-tell loop that hands them to other machines. Only
            the time from ``ask`` to ``tell`` is measured then, since all else would be this
            process's own. ``"reported"`` where each trial's row reports the rest:
            ``trial.set_user_attr("quota:cpu_time", seconds)`` before ``tell``. Isolated trials
            are measured in either case.
        lease: Seconds, or text with its unit, without a sign of life after which a worker on
            another machine is considered dead and its trial failed. Workers on the same machine
            are known by their processes.
        breach_probability: A point that breaches a limit with more than this probability is not
            run; 1 runs all. From eight trials on, or at once with a ``footprint``.
        on_veto: What replaces such a point: ``"redraw"`` another draw of the base sampler,
            ``"nearest"`` the nearest point that breaches with at most half of that probability,
            ``"skip"`` none, the trial ends as rejected; ``"auto"`` what suits the base sampler:
            the nearest point for TPE, NSGA-II, NSGA-III and GP. Grids are always skipped.
        audits: Share of these points that is run under the hard limit nevertheless, so that a
            wrong veto is found; 5% by default where trials are isolated, else none.
        n_candidates: Number of points that the base sampler draws for each trial, whose time grows
            accordingly. From five completed trials on, the point with the greatest expected
            improvement per predicted share of what is left of the quota's totals runs. Fewer are
            drawn with a slow ``footprint``; one if nothing is predicted, the only total is a
            ``cost`` of several prices, or parameters or ranges differ between trials. ``on_veto``
            applies if none is admitted. Several objectives are a ValueError at the first ``ask``.
        on_projected: What is done once the quota is likely to run out before the end of the
            ``strategy``, besides the warning: ``"continue"`` until it is used up, ``"stop"`` now,
            or ``"raise"`` :class:`~optuna_quota.StudyRejected`.

    Raises:
        TypeError: If an argument is of the wrong type, as a ``quota`` that is no :class:`Quota`.
        ValueError: If a probability or share is out of its range, an option unknown,
            ``base_sampler`` a QuotaSampler, or for ``n_candidates`` one that enumerates points or
            repeats itself (GP, BoTorch). If ``metering=False`` leaves a quota's usage unknown.
        StudyRejected: If strategy, footprint and quota alone decide that the study does not fit.
    """

    def __init__(
        self,
        base_sampler: BaseSampler | None = None,
        *,
        quota: Quota | None = None,
        strategy: Strategy | None = None,
        footprint: Usage | Callable[[dict[str, Any]], Usage] | Any = None,
        confidence: float = 0.95,
        deadline: options.DeadlineOption | None = None,
        limits: Limits | None = None,
        meters: Sequence[Meter] = (),
        on_exhausted: options.OnExhausted = "stop",
        on_crowded: options.OnCrowded = "wait",
        gpus_per_trial: int | None = None,
        one_gpu: bool = False,
        metering: options.Metering = True,
        lease: Duration = LEASE,
        breach_probability: float = 0.5,
        on_veto: options.OnVeto = "auto",
        audits: float | None = None,
        n_candidates: int = 1,
        on_projected: options.OnProjected = "continue",
    ) -> None:
        options.check_types(
            base_sampler=(base_sampler, BaseSampler),
            quota=(quota, Quota),
            strategy=(strategy, Strategy),
            limits=(limits, Limits),
        )
        self._nested: list[Any] = nesting.find_nested(base_sampler, BaseSampler)
        if any(isinstance(each, QuotaSampler) for each in self._nested):
            raise ValueError(
                f"`base_sampler` must hold no QuotaSampler but got {base_sampler}: a trial would "
                "be counted twice. Give one QuotaSampler the whole quota."
            )
        self.base_sampler = TPESampler() if base_sampler is None else base_sampler
        self.quota = Quota() if quota is None else quota
        self.strategy = strategy
        self.footprint = footprint
        self.limits = limits
        self.meters = check_names(meters)
        if footprint is not None and not isinstance(footprint, Usage):
            footprint = as_footprint(footprint, lenient=True)
        self._options = options.SamplerOptions(
            base_sampler=self.base_sampler,
            quota=self.quota,
            strategy=strategy,
            footprint=footprint,
            confidence=confidence,
            breach_probability=breach_probability,
            on_veto=on_veto,
            audits=audits,
            on_exhausted=on_exhausted,
            on_crowded=on_crowded,
            on_projected=on_projected,
            gpus_per_trial=options.checked_gpus_per_trial(gpus_per_trial, one_gpu),
            metering=metering,
            lease=parse_seconds(lease, "lease"),
            deadline=None if deadline is None else options.parse_deadline(deadline, time.time()),
            n_candidates=n_candidates,
        )
        self._nested = self._nested or [self.base_sampler]
        self._demanding = [s for s in self._nested if _optuna.demands_uniform_constraints(s)]
        self._sessions = StudySessions()
        self._lock = threading.Lock()
        admit_strategy(self._options, limits or Limits())
        adapt_tools()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process; a lambda as footprint goes by its value."""
        state = {k: v for k, v in vars(self).items() if k not in ("_sessions", "_lock")}
        return by_value(state) if callable(self.footprint) else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(from_value(state), _sessions=StudySessions(), _lock=threading.Lock())
        adapt_tools()

    def __getattr__(self, name: str) -> Any:
        """Return one of the options that only its parts read, such as ``confidence``."""
        if name not in options.SamplerOptions.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._options, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options are final, as the sessions of studies have read them."""
        if "_options" in vars(self) and name in options.SamplerOptions.__dataclass_fields__:
            raise AttributeError(
                f"`{name}` can't be changed after the QuotaSampler is created, but got {value!r}. "
                "Set `study.sampler` to a new one."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"QuotaSampler({type(self.base_sampler).__name__}(), quota={self.quota!r})"

    def reseed_rng(self) -> None:
        """Reseed the base sampler."""
        self.base_sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Admit a trial and start its metering, or keep it from running."""
        whole = _optuna.unwrap_study(study)
        asked = _optuna.in_ask()
        if metering_loop().find(key_of(whole, trial)) is not None and not asked:
            # Another Trial object of a trial that already runs in this process.
            return
        try:
            while (
                asked
                and _optuna.may_be_enqueued(trial)
                and not self._session(whole).ledger.take_enqueued(trial)
            ):
                trial = _optuna.take_another_row(whole)
            clear_copied_attributes(whole, trial)
            self._admit(study, whole, trial)
        except BaseException as error:
            session = self._sessions.find(whole)
            if session is not None and session.skip_if_finished(whole, trial, error):
                return
            finish_failed_row(whole, trial, error, admitted=False)
            if session is not None:
                session.ledger.forget(_optuna.trial_id_of(trial))
            if isinstance(error, StudyRejected) or not isinstance(error, Exception):
                # For example by Ctrl-C while it waited.
                enqueue_again(whole, trial, "could not start")
            raise

    def _admit(self, study: Study, whole: Study, trial: FrozenTrial) -> None:
        wrap_nesting_pruner(whole)
        if self._options.deadline is not None and not nesting.quota_pruners(whole.pruner):
            # Its `should_prune` is what stops trials in process.
            whole.pruner = QuotaPruner(whole.pruner, limits=Limits())
        limits = self._limits_of(whole)
        self._session(whole).admit(study, whole, trial, limits, self.meters)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Infer the base sampler's space, plus the parameters that are judged along with it."""
        with fail_unfinished_trial(study, trial):
            space = self.base_sampler.infer_relative_search_space(study, trial)
            return self._session(study).candidates.relative_space(trial, space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample a point by the base sampler, and replace it if it is not admitted."""

        def draw(each: CandidateFilter, seen: Study) -> dict[str, Any]:
            return each.sample_relative(seen, trial, search_space)

        return self._draw(study, trial, draw, len(search_space))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample a parameter by the base sampler, again if the point is not admitted."""

        def draw(each: CandidateFilter, seen: Study) -> dict[str, Any]:
            found = each.sample_independent(seen, trial, param_name, param_distribution)
            return {param_name: found}

        return self._draw(study, trial, draw)[param_name]

    def _draw(
        self, study: Study, trial: FrozenTrial, draw: _Draw, n_params: int = 0
    ) -> dict[str, Any]:
        with fail_unfinished_trial(study, trial):
            session = self._session(study)
            for more in reversed(range(_MOST_DRAWS)):
                with self._learning_constraints(study, trial, n_params) as seen:
                    drawn = draw(session.candidates, seen)
                if session.promise(trial, drawn):
                    break
                # Others reserved it first. None can take what this trial holds.
                session.judge_again(study, trial, free=more > 1)
            return drawn

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Record a trial before its row is finished, and end the study with its quota."""
        whole = _optuna.unwrap_study(study)
        session = self._session(whole)
        if session.is_refused(trial):
            if state == TrialState.COMPLETE:
                record_ignored_rejection(whole, trial)
            return
        try:
            seen = _optuna.skip_empty_rows(study, self._nested, trial)
            if seen is study or not _optuna.is_empty_row(trial, state):
                self.base_sampler.after_trial(seen, trial, state, values)
        except Exception as error:
            # Plain Optuna would end the study, though the trial stopped before the objective set
            # what the constraints are computed from.
            if state == TrialState.COMPLETE or not _optuna.raised_by_constraints_func(error):
                raise
            session.warn_of_constraints(trial, error)
        finally:
            self._finish_trial(session, whole, trial, state)

    def project(self, study: Study) -> Projection:
        """Return what a study will have used at the end of the strategy.

        What was used so far, and what the rest of the strategy will use: its points are drawn
        from where the base sampler is going.

        Example:

            .. code-block:: python

                print(study.sampler.project(study))

        Args:
            study: The study.

        Raises:
            ValueError: If there is no strategy, or nothing is known of what a trial uses.
        """
        footprint = self._session(study).candidates.footprint
        return project_study(self._options, self._limits_of(study), study, footprint)

    def _finish_trial(
        self, session: StudySession, study: Study, trial: FrozenTrial, state: TrialState
    ) -> None:
        """Record a trial; errors are logged, so that its result is stored afterwards."""
        try:
            if _optuna.may_write_constraints(self.base_sampler):
                trial = read_row(study, trial)
            session.finish_trial(study, trial, state, partial(self._limits_of, study))
            session.end_when_exhausted(study)
        except Exception as fault:  # noqa: BLE001 - any backend's own
            _logger.warning(
                f"Trial {trial.number} has its result, but what it used may be neither recorded "
                f"nor counted toward the quota: {fault!r}."
            )

    def _learning_constraints(
        self, study: Study, trial: FrozenTrial, n_params: int = 0
    ) -> contextlib.AbstractContextManager[Study]:
        """Return the study with the constraints that the base sampler needs.

        ``n_params`` is the size of the relative search space, 0 to sample one parameter.
        """
        limits = partial(self._limits_of, _optuna.unwrap_study(study))

        def constrain(trials: Sequence[FrozenTrial]) -> Sequence[Mapping[str, float]]:
            found = uniform_constraints(trials, limits())
            n_constraints = len(found[0]) if found else 0
            for sampler in self._demanding:
                _optuna.forget_constraint_models(sampler, n_constraints, n_params)
            return found

        uniform = constrain if self._demanding and n_params else None
        return _optuna.learn_constraints(
            study, self._nested, trial, uniform, limited=lambda: bool(limits())
        )

    def _limits_of(self, study: Study) -> Limits:
        """Return the limits on each trial: the pruner's, else the sampler's own."""
        return nesting.agreed_limits(
            self.limits, nesting.pruner_limits(nesting.quota_pruners(study.pruner)), _PLACES
        )

    def _session(self, study: Study) -> StudySession:
        whole = _optuna.unwrap_study(study)
        with self._lock:
            session = self._sessions.find(whole)
            if session is None:
                adapt_tools()
                session = StudySession(whole, self._options)
                self._sessions.add(whole, session)
        return session
