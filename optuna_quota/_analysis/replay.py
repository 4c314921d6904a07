"""Replays a study under other limits and quotas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
import math
from typing import Literal

from optuna.study import Study
from optuna.trial import FrozenTrial

from optuna_quota import _records
from optuna_quota._ledger.totals import IntervalUnion, LONGEST_GAP
from optuna_quota._limits import Limits, Quota
from optuna_quota._metering.breach import is_breach, quota_bound
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource
from optuna_quota._table import check_study, DataFrame, usage_at_least
from optuna_quota._units import counted, wrap
from optuna_quota._usage import Breach
from optuna_quota._utilization.data import best_numbers


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
        """Return the usage of a resource, None if unknown; trial time is the wall time."""
        return self.amounts.get(CHARGED_RESOURCES.get(resource, resource))

    def terminated(self, seconds: float, by: str, scope: Literal["limit", "quota"]) -> TrialTrace:
        """Return the trace of the trial terminated after ``seconds``; totals grow evenly over it.

        Peaks are kept, as it is unknown when they occurred.
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


def traces_of(
    trials: Sequence[FrozenTrial], records: Sequence[_records.TrialRecord]
) -> list[TrialTrace]:
    """Return a trace of each finished trial that ran, in the order of their starts."""
    first = min((t.datetime_start for t in trials if t.datetime_start), default=None)
    traces, dates_fit = [], True
    for trial, record in zip(trials, records, strict=True):
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


def apply_limits(
    trace: TrialTrace, limits: Mapping[str, float], scope: Literal["limit", "quota"] = "limit"
) -> TrialTrace:
    """Return the trace under limits: terminated at the limit that it reaches first."""
    stops = {
        resource: _seconds_to(trace, resource, limit)
        for resource, limit in limits.items()
        if is_breach(resource, trace.amounts.get(resource, 0.0), limit)
    }
    if not stops:
        return trace
    first = min(stops, key=stops.__getitem__)
    return trace.terminated(stops[first], first, scope)


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
    alone = [apply_limits(trace, quota.held, "quota") for trace in traces]
    ends = {name: _used_up(alone, quota, name, total) for name, total in quota.totals.items()}
    by = min(ends, key=ends.__getitem__, default=None)
    if by is None or not math.isfinite(ends[by]):
        return alone, math.inf, None
    if by == "n_trials":
        # By order, as several trials may have started at the same moment.
        left = int(quota.totals[by])
        return [*alone[:left], *(trace.not_run(by) for trace in alone[left:])], ends[by], by
    return [_ended_at(trace, ends[by], by) for trace in alone], ends[by], by


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
    """When the clock time of the trials, without longer pauses, reaches ``total``."""
    clock = IntervalUnion(gap=LONGEST_GAP)
    for trace in traces:
        if trace.seconds > 0:
            clock.add(trace.start, trace.end)
        if clock.total > quota_bound(total):
            return trace.end - (clock.total - total)
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


class ReplayReport:
    """What limits and a quota would have done to a study.

    Example:

        .. code-block:: python

            report = replay(study, limits=Limits(memory="2GiB"))
            print(report.saved, report.lost, report.best_lives)

    Attributes:
        quota: The quota replayed, None without one.
        limits: The limits replayed, None without any.
        ended_at: Seconds into the study at which the quota would have ended it, or None.
        ended_by: The resource that would have been used up, None likewise.
        notes: Sentences on what could not be replayed.
    """

    def __init__(
        self, study: Study, *, quota: Quota | None = None, limits: Limits | None = None
    ) -> None:
        self._study = study
        self.quota = quota
        self.limits = limits
        self._before = traces_of(*_records.read_finished(study))
        after = [apply_limits(t, limits.amounts()) if limits else t for t in self._before]
        self._after, end, self.ended_by = (
            apply_quota(after, quota) if quota else (after, math.inf, None)
        )
        self.ended_at = end if self.ended_by else None
        self.notes = list(_notes(self._before, quota, limits))

    @cached_property
    def table(self) -> DataFrame:
        """A row for each trial that ran.

        The columns are ``number``, ``outcome`` (in the study), ``fate`` (in the replay: ``kept``,
        ``terminated`` or ``not run``), ``by`` (the resource that decided it), ``scope``
        (``limit`` or ``quota``), ``seconds`` (how long it would have run), ``saved_trial_time``,
        ``saved_cpu_time``, ``saved_gpu_time``, ``saved_energy`` (NaN where the usage is unknown),
        and ``lost`` (whether it completed and would not have).
        """
        import pandas as pd

        texts = dict.fromkeys(("outcome", "replayed", "by", "scope"), "object")
        columns = {
            name: pd.Series([getattr(trace, name) for trace in self._after], dtype=dtype)
            for name, dtype in {"number": "int64", **texts, "seconds": "float64"}.items()
        }
        for name in CHARGED_RESOURCES:
            saved = map(_saved, self._before, self._after, repeat(name))
            columns[f"saved_{name}"] = pd.Series(list(saved), dtype="float64")
        table: DataFrame = pd.DataFrame(columns).rename(columns={"replayed": "fate"})
        # The outcome is that of the study, before the replay.
        table["lost"] = (table["outcome"] == "completed") & (table["fate"] != "kept")
        return table

    @cached_property
    def saved(self) -> dict[str, float]:
        """What would have been saved by resource, in SI base units, of known usage."""
        totals = {name: self.table[f"saved_{name}"].dropna() for name in CHARGED_RESOURCES}
        return {name: float(total.sum()) for name, total in totals.items() if len(total)}

    @property
    def lost(self) -> list[int]:
        """Numbers of the trials that completed and would not have."""
        return [int(n) for n in self.table.loc[self.table["lost"], "number"]]

    @property
    def terminated(self) -> list[int]:
        """Numbers of the trials that would have been terminated."""
        return [t.number for t in self._after if t.replayed == "terminated"]

    @property
    def not_run(self) -> list[int]:
        """Numbers of the trials that would not have started because the quota was used up."""
        return [t.number for t in self._after if t.replayed == "not run"]

    @cached_property
    def best(self) -> list[int]:
        """Number of the best trial of the study, or those of the Pareto front."""
        return best_numbers(self._study, self._study.get_trials(deepcopy=False))

    @property
    def best_lives(self) -> bool | None:
        """Whether the best trial (all of the Pareto front) would have completed; None without."""
        return not set(self.best) & set(self.lost) if self.best else None

    @cached_property
    def best_left(self) -> list[int]:
        """Number of the best trial that would have completed, or those of the Pareto front."""
        trials, lost = self._study.get_trials(deepcopy=False), set(self.lost)
        return best_numbers(self._study, (t for t in trials if t.number not in lost))

    def summary(self) -> str:
        """Return the replay as text for a terminal."""
        return "\n".join(line for text in self._sentences() for line in wrap(text))

    def _sentences(self) -> list[str]:
        name = repr(self._study.study_name)
        if not self._before:
            return [f"Study {name}: no trial has run, there is nothing to replay."]
        rules = " and ".join(repr(rule) for rule in (self.limits, self.quota) if rule)
        return [
            f"Replay of study {name} ({counted(len(self._before), 'trial')}) under {rules}:",
            self._ended_text(),
            self._terminated_text(),
            self._saved_text(),
            self._best_text(),
            *self.notes,
        ]

    def _ended_text(self) -> str:
        if not self.quota:
            return "No quota, so the study would have run to its end."
        if self.ended_by is None or self.ended_at is None:
            return "The quota would not have been used up."
        return (
            f"The quota of {get_resource(self.ended_by).title} would have been used up "
            f"{format_amount('wall_time', self.ended_at)} into the study: "
            f"{counted(len(self.not_run), 'trial')} would not have run."
        )

    def _terminated_text(self) -> str:
        ended = ((t.by, t.scope) for t in self._after if t.replayed == "terminated" and t.by)
        counts = Counter(f"{get_resource(by).title} ({scope})" for by, scope in ended)
        causes = ", ".join(f"{count} by {by}" for by, count in counts.items())
        return (
            f"{counted(len(self.terminated), 'trial')} would have been terminated"
            f"{f': {causes}' if causes else ''}; "
            f"{counted(len(self.lost), 'completed trial')} would have been lost."
        )

    def _saved_text(self) -> str:
        parts = []
        for name, saved in self.saved.items():
            total = sum(t.used(name) or 0.0 for t in self._before)
            if saved > 0:
                share = f"{100 * saved / total:.0f}% of" if total else "of"
                amounts = f"{format_amount(name, saved)} ({share} {format_amount(name, total)})"
                parts.append(f"{get_resource(name).title} {amounts}")
        text = f"Saved: {', '.join(parts)}" if parts else "Nothing would have been saved"
        # Only of trials that were ended by a limit it is stored when they held how much.
        pairs = zip(self._before, self._after, strict=True)
        late = sum(a.replayed == "terminated" and a.seconds == b.seconds for b, a in pairs)
        if late:
            text += f", at least: when {counted(late, 'trial')} reached the limit is unknown"
        return f"{text}."

    def _best_text(self) -> str:
        if self.best_lives is None:
            return "No trial of the study completed, so there is no best trial to lose."
        if len(self.best) > 1:
            kept = len(set(self.best) - set(self.lost))
            return f"{kept} of {len(self.best)} trials of the Pareto front would have completed."
        if self.best_lives:
            return f"The best trial ({self.best[0]}) would have completed."
        if not self.best_left:
            return f"The best trial ({self.best[0]}) would have been lost, like all others."
        values = {t.number: t.values for t in self._study.get_trials(deepcopy=False)}
        was, left = (values[n][0] for n in (self.best[0], self.best_left[0]))
        return (
            f"The best trial ({self.best[0]}, {was:.6g}) would have been lost; the best of the "
            f"others is trial {self.best_left[0]} ({left:.6g})."
        )

    __str__ = summary

    def __repr__(self) -> str:
        return (
            f"<ReplayReport: {len(self.terminated)} terminated, {len(self.not_run)} not run, "
            f"{len(self.lost)} lost of {len(self._before)} trials>"
        )


def replay(
    study: Study, *, quota: Quota | None = None, limits: Limits | None = None
) -> ReplayReport:
    """Compute what a quota and limits would have done to a finished study.

    Example:

        .. code-block:: python

            report = replay(study, limits=Limits(memory="4GiB"), quota=Quota(cpu_time="2h"))
            print(report)
            report.best_lives, report.saved

    A memory limit stops a trial when its recorded timeline exceeds it; a limit on a total when
    even growth over the trial reaches it; any other at the end of the trial, so that savings are
    never overstated. A study that ran without this library has wall times only. Which other
    points a sampler would have drawn is unknown and not counted.

    Args:
        study: Any Optuna study.
        quota: Ceilings on the whole study.
        limits: Ceilings on each trial.

    Raises:
        ValueError: If neither a quota nor limits are given.
        TypeError: If one of them is of another type.
    """
    check_study(study)
    if quota is not None and not isinstance(quota, Quota):
        raise TypeError(f"`quota` must be a Quota but got {quota!r}.")
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"`limits` must be Limits but got {limits!r}.")
    if not quota and not limits:
        raise ValueError("`quota` or `limits` must be given and not be empty.")
    return ReplayReport(study, quota=quota, limits=limits)


def _saved(before: TrialTrace, after: TrialTrace, resource: str) -> float:
    used = before.used(resource)
    if used is None:
        return math.nan
    if before.seconds > 0:
        return used * (1 - after.seconds / before.seconds)
    return used if after.replayed == "not run" else 0.0


def _notes(
    traces: Sequence[TrialTrace], quota: Quota | None, limits: Limits | None
) -> Iterator[str]:
    if not traces:
        return
    asked = {**(quota.amounts() if quota else {}), **(limits.amounts() if limits else {})}
    for resource in asked:
        if resource in ("n_trials", "cost"):
            continue
        unknown = sum(t.used(resource) is None for t in traces)
        title = get_resource(resource).title
        if unknown == len(traces):
            yield f"No trial has a known {title}: it could not be replayed."
        elif unknown:
            yield f"{counted(unknown, 'trial')} without a known {title} could not be replayed."
    ended = sum(t.outcome == "terminated" for t in traces)
    if ended and limits:
        yield (
            f"{counted(ended, 'trial')} had been terminated already; how they would have "
            "continued under wider limits is unknown."
        )
