"""The course of each finished trial, and what other limits and quotas would have made of it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
import math
from typing import Literal
from typing import TYPE_CHECKING

from optuna_quota import _records
from optuna_quota._ledger.totals import LONGEST_GAP
from optuna_quota._resources import get_resource
from optuna_quota._table import measured_usage


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._resources import Limits
    from optuna_quota._resources import Quota


Fate = Literal["kept", "terminated", "not run"]


@dataclass(frozen=True)
class Course:
    """How one trial went, or would have gone.

    Attributes:
        number: Its number.
        outcome: How it ended, None when unknown.
        start: Seconds since the first trial of the study started.
        seconds: How long it ran.
        amounts: What it used, by resource, in SI base units.
        timeline: Pairs of seconds since the start and bytes of memory.
        fate: What became of it.
        by: The resource that decided its fate.
        scope: Whether a limit or a quota did.
    """

    number: int
    outcome: str | None
    start: float
    seconds: float
    amounts: Mapping[str, float]
    timeline: Sequence[tuple[float, float]] = ()
    fate: Fate = "kept"
    by: str | None = None
    scope: Literal["limit", "quota"] | None = None

    @property
    def end(self) -> float:
        """Seconds from the start of the study to the end of the trial."""
        return self.start + self.seconds

    def stopped(self, seconds: float, by: str, scope: Literal["limit", "quota"]) -> Course:
        """Return the course with the trial terminated after ``seconds``.

        Totals are taken to grow evenly over a trial; peaks stay, for nobody knows when they were.
        """
        share = seconds / self.seconds if self.seconds > 0 else 1.0
        amounts = {
            name: amount if get_resource(name).peak else amount * share
            for name, amount in self.amounts.items()
        }
        return replace(
            self, seconds=seconds, amounts=amounts, fate="terminated", by=by, scope=scope
        )

    def not_run(self, by: str) -> Course:
        """Return the course of a trial that the quota left no room for."""
        return replace(self, seconds=0.0, amounts={}, fate="not run", by=by, scope="quota")


def courses_of(study: Study) -> list[Course]:
    """Return the courses of the trials that ran, in the order in which they started."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    found, dates_fit = [], True
    first = min((t.datetime_start for t in trials if t.datetime_start), default=None)
    for trial in trials:
        record = _records.read_record(trial)
        outcome, amounts = _records.outcome_of(trial, record), measured_usage(trial, record)
        if record.breach and record.breach.resource in amounts:
            # One stopped on its way to the limit would have passed it.
            name, limit = record.breach.resource, record.breach.limit
            amounts[name] = max(amounts[name], limit)
        if outcome == "rejected":
            continue
        start = math.nan
        if trial.datetime_start and first:
            start = (trial.datetime_start - first).total_seconds()
        seconds = amounts.get("wall_time", 0.0)
        if trial.datetime_start and trial.datetime_complete:
            between = (trial.datetime_complete - trial.datetime_start).total_seconds()
            dates_fit &= between >= seconds / 2
        found.append(Course(trial.number, outcome, start, seconds, amounts, record.timeline))
    if not dates_fit or any(math.isnan(c.start) for c in found):
        return list(_one_after_another(found))
    return sorted(found, key=lambda c: (c.start, c.number))


def _one_after_another(courses: Sequence[Course]) -> Iterator[Course]:
    """Rows that were added to the study by hand bear the dates of that, not of the trials."""
    clock = 0.0
    for course in courses:
        yield replace(course, start=clock)
        clock += course.seconds


def under_limits(course: Course, limits: Limits) -> Course:
    """Return the course of a trial under limits: stopped by the one it reaches first."""
    stops = {
        resource: _seconds_to(course, resource, limit)
        for resource, limit in limits.amounts().items()
        if course.amounts.get(resource, 0.0) > limit
    }
    if not stops:
        return course
    first = min(stops, key=lambda resource: stops[resource])
    return course.stopped(stops[first], first, "limit")


def _seconds_to(course: Course, resource: str, limit: float) -> float:
    """When a trial reaches a limit: by its timeline, by even growth, or only at its end."""
    if resource == "memory" and course.timeline:
        over = (seconds for seconds, memory in course.timeline if memory > limit)
        return min(next(over, course.seconds), course.seconds)
    if get_resource(resource).peak:
        return course.seconds
    return course.seconds * limit / course.amounts[resource]


def under_quota(courses: Sequence[Course], quota: Quota) -> tuple[list[Course], float, str | None]:
    """Return the courses under a quota, when it would have ended the study, and by which resource.

    The trial that is running when a total is used up is terminated there and none starts after.
    A ceiling on what runs together only stops a trial that is over it alone: that others would
    have had to wait can't be replayed.

    Args:
        courses: In the order of their starts.
        quota: The quota.
    """
    held = quota.held
    alone = [_under_held(course, held) for course in courses]
    ends = {name: _used_up(alone, quota, name, total) for name, total in quota.totals.items()}
    by = min(ends, key=lambda name: ends[name], default=None)
    if by is None or not math.isfinite(ends[by]):
        return alone, math.inf, None
    if by == "n_trials":
        # By their places: trials may have started at one moment.
        left = int(quota.totals[by])
        return [*alone[:left], *(course.not_run(by) for course in alone[left:])], ends[by], by
    return [_cut(course, ends[by], by) for course in alone], ends[by], by


def _under_held(course: Course, held: Mapping[str, float]) -> Course:
    for resource, ceiling in held.items():
        if course.amounts.get(resource, 0.0) > ceiling:
            return course.stopped(_seconds_to(course, resource, ceiling), resource, "quota")
    return course


def _cut(course: Course, end: float, by: str) -> Course:
    if course.start >= end:
        return course.not_run(by)
    if course.end <= end * (1 + 1e-12):
        return course
    return course.stopped(end - course.start, by, "quota")


def _used_up(courses: Sequence[Course], quota: Quota, resource: str, total: float) -> float:
    """Return the second of the study at which a total quota is used up; inf when never."""
    if resource == "n_trials":
        return courses[int(total)].start if len(courses) > total else math.inf
    if resource == "wall_time":
        return _clock_used_up(courses, total)
    return _sum_used_up([(c, _amount(c, quota, resource)) for c in courses], total)


def _amount(course: Course, quota: Quota, resource: str) -> float:
    if resource == "cost":
        return quota.price({**course.amounts, "trial_time": course.seconds})
    if resource == "trial_time":
        return course.seconds
    return course.amounts.get(resource, 0.0)


def _clock_used_up(courses: Sequence[Course], total: float) -> float:
    """Clock time reaches ``total``, without the longer pauses between trials."""
    used, until = 0.0, -math.inf
    for course in courses:
        begin = until if course.start - until <= LONGEST_GAP else course.start
        if course.end > begin:
            if used + course.end - begin > total * (1 + 1e-9):
                return begin + total - used
            used, until = used + course.end - begin, course.end
    return math.inf


def _sum_used_up(amounts: Sequence[tuple[Course, float]], total: float) -> float:
    """The sum over trials, each growing evenly from its start to its end, reaches ``total``."""
    changes: list[tuple[float, float, float]] = []  # (second, change of the rate, jump)
    for course, amount in amounts:
        if course.seconds > 0:
            rate = amount / course.seconds
            changes += [(course.start, rate, 0.0), (course.end, -rate, 0.0)]
        else:
            changes.append((course.start, 0.0, amount))
    used = rate = clock = 0.0
    for second, change, jump in sorted(changes):
        grown = used + rate * (second - clock)
        if grown > total * (1 + 1e-9) and rate > 0:
            return clock + (total - used) / rate
        used, clock, rate = grown + jump, second, rate + change
        if used > total * (1 + 1e-9):
            return second
    return math.inf
