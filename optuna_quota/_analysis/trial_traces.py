"""How each trial of a study ran, and how it would have run under other limits and quotas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
import math
from typing import Literal, TYPE_CHECKING

from optuna_quota import _records
from optuna_quota._ledger.totals import LONGEST_GAP
from optuna_quota._metering.breach import is_breach, quota_bound
from optuna_quota._resources import CHARGED_RESOURCES, get_resource
from optuna_quota._table import usage_at_least


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._limits import Limits, Quota
    from optuna_quota._usage import Breach


ReplayOutcome = Literal["kept", "terminated", "not run"]


@dataclass(frozen=True)
class TrialTrace:
    """The time and usage of one trial, as measured or as replayed."""

    number: int
    outcome: str | None  # how it ended, None when unknown
    start: float  # seconds since the first trial of the study started
    seconds: float  # how long it ran
    amounts: Mapping[str, float]  # usage by resource, in SI base units
    timeline: Sequence[tuple[float, float]] = ()  # seconds since the start, bytes of memory
    breach: Breach | None = None  # that was recorded
    replayed: ReplayOutcome = "kept"
    by: str | None = None  # the resource that decided the replay
    scope: Literal["limit", "quota"] | None = None

    @property
    def end(self) -> float:
        return self.start + self.seconds

    def used(self, resource: str) -> float | None:
        """Return the usage of a resource, None when unknown; trial time is the wall time."""
        return self.amounts.get(CHARGED_RESOURCES.get(resource, resource))

    def terminated(self, seconds: float, by: str, scope: Literal["limit", "quota"]) -> TrialTrace:
        """Return the trace of the trial terminated after ``seconds``; totals grow evenly over it.

        Peaks stay: when they were reached is unknown.
        """
        share = seconds / self.seconds if self.seconds > 0 else 1.0
        amounts = {
            name: amount if get_resource(name).peak else amount * share
            for name, amount in self.amounts.items()
        }
        return replace(
            self, seconds=seconds, amounts=amounts, replayed="terminated", by=by, scope=scope
        )

    def not_run(self, by: str) -> TrialTrace:
        """Return the trace of a trial that would start after the quota was used up."""
        return replace(self, seconds=0.0, amounts={}, replayed="not run", by=by, scope="quota")


def trial_traces(study: Study) -> list[TrialTrace]:
    """Return a trace of each trial that ran, in the order of their starts."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    first = min((t.datetime_start for t in trials if t.datetime_start), default=None)
    traces, dates_fit = [], True
    for trial in trials:
        record = _records.read_record(trial)
        outcome, amounts = _records.outcome_of(trial, record), usage_at_least(trial, record)
        if outcome == "rejected":
            continue
        start = math.nan
        if trial.datetime_start and first:
            start = (trial.datetime_start - first).total_seconds()
        seconds = amounts.get("wall_time", 0.0)
        span = math.inf if trial.duration is None else trial.duration.total_seconds()
        dates_fit &= not math.isnan(start) and span >= seconds / 2
        traces.append(
            TrialTrace(
                trial.number, outcome, start, seconds, amounts, record.timeline, record.breach
            )
        )
    if dates_fit:
        return sorted(traces, key=lambda t: (t.start, t.number))
    # Trials added with `study.add_trials` are dated by that call: assume one after another.
    clock, sequential = 0.0, []
    for trace in traces:
        sequential.append(replace(trace, start=clock))
        clock += trace.seconds
    return sequential


def apply_limits(trace: TrialTrace, limits: Limits) -> TrialTrace:
    """Return the trace under limits: terminated at the limit that it reaches first."""
    stops = {
        resource: _seconds_to(trace, resource, limit)
        for resource, limit in limits.amounts().items()
        if is_breach(resource, trace.amounts.get(resource, 0.0), limit)
    }
    if not stops:
        return trace
    first = min(stops, key=stops.__getitem__)
    return trace.terminated(stops[first], first, "limit")


def _seconds_to(trace: TrialTrace, resource: str, limit: float) -> float:
    """When a trial reaches a limit: by its timeline, by even growth, or else at its end."""
    if resource == "memory" and trace.timeline:
        over = (
            seconds for seconds, memory in trace.timeline if is_breach(resource, memory, limit)
        )
        return min(next(over, trace.seconds), trace.seconds)
    if get_resource(resource).peak:
        return trace.seconds
    return trace.seconds * limit / trace.amounts[resource]


def apply_quota(
    traces: Sequence[TrialTrace], quota: Quota
) -> tuple[list[TrialTrace], float, str | None]:
    """Return the traces under a quota, when it would have ended the study, and by which resource.

    Trials that run when a total is used up are terminated at that moment, and none starts after
    it. A ceiling on what trials hold together only stops a trial that exceeds it alone: how
    others would have waited can't be replayed.
    """
    alone = [_under_held(trace, quota.held) for trace in traces]
    ends = {name: _used_up(alone, quota, name, total) for name, total in quota.totals.items()}
    by = min(ends, key=ends.__getitem__, default=None)
    if by is None or not math.isfinite(ends[by]):
        return alone, math.inf, None
    if by == "n_trials":
        # By their order, since several trials may have started at the same moment.
        left = int(quota.totals[by])
        return [*alone[:left], *(trace.not_run(by) for trace in alone[left:])], ends[by], by
    return [_ended_at(trace, ends[by], by) for trace in alone], ends[by], by


def _under_held(trace: TrialTrace, held: Mapping[str, float]) -> TrialTrace:
    for resource, ceiling in held.items():
        if is_breach(resource, trace.amounts.get(resource, 0.0), ceiling):
            return trace.terminated(_seconds_to(trace, resource, ceiling), resource, "quota")
    return trace


def _ended_at(trace: TrialTrace, end: float, by: str) -> TrialTrace:
    if trace.start >= end:
        return trace.not_run(by)
    if trace.end <= end * (1 + 1e-12):
        return trace
    return trace.terminated(end - trace.start, by, "quota")


def _used_up(traces: Sequence[TrialTrace], quota: Quota, resource: str, total: float) -> float:
    """Return the second of the study at which a total quota is used up; inf when never."""
    if resource == "n_trials":
        return traces[int(total)].start if len(traces) > total else math.inf
    if resource == "wall_time":
        return _clock_used_up(traces, total)
    amounts = [{**trace.amounts, "trial_time": trace.seconds} for trace in traces]
    if resource == "cost":
        return _sum_used_up(traces, [quota.price(each) for each in amounts], total)
    return _sum_used_up(traces, [each.get(resource, 0.0) for each in amounts], total)


def _clock_used_up(traces: Sequence[TrialTrace], total: float) -> float:
    """When the clock time of the trials reaches ``total``, longer pauses left out."""
    used, until = 0.0, -math.inf
    for trace in traces:
        begin = until if trace.start - until <= LONGEST_GAP else trace.start
        if trace.end > begin:
            if used + trace.end - begin > quota_bound(total):
                return begin + total - used
            used, until = used + trace.end - begin, trace.end
    return math.inf


def _sum_used_up(traces: Sequence[TrialTrace], amounts: Sequence[float], total: float) -> float:
    """When the sum over trials, each growing evenly over its time, reaches ``total``."""
    changes: list[tuple[float, float, float]] = []  # second, change of the rate, jump
    for trace, amount in zip(traces, amounts, strict=True):
        if trace.seconds > 0:
            rate = amount / trace.seconds
            changes += [(trace.start, rate, 0.0), (trace.end, -rate, 0.0)]
        else:
            changes.append((trace.start, 0.0, amount))
    used = rate = clock = 0.0
    for second, change, jump in sorted(changes):
        grown = used + rate * (second - clock)
        if grown > quota_bound(total) and rate > 0:
            return clock + (total - used) / rate
        used, clock, rate = grown + jump, second, rate + change
        if used > quota_bound(total):
            return second
    return math.inf
