"""What other limits and quotas would have done to a finished study."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
import math
from typing import TYPE_CHECKING

from optuna_quota._analysis.courses import Course
from optuna_quota._analysis.courses import courses_of
from optuna_quota._analysis.courses import under_limits
from optuna_quota._analysis.courses import under_quota
from optuna_quota._analysis.fronts import best_numbers
from optuna_quota._analysis.summary import counted
from optuna_quota._analysis.summary import wrap
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Limits
from optuna_quota._resources import Quota


if TYPE_CHECKING:
    from optuna.study import Study
    import pandas as pd


_TOTALS = ("trial_time", "cpu_time", "gpu_time", "energy")


class ReplayReport:
    """What limits and a quota would have done to a study.

    Example:

        .. code-block:: python

            report = replay(study, limits=Limits(memory="2GiB"))
            print(report.saved, report.lost, report.best_lives)

    Attributes:
        quota: The quota replayed, None without one.
        limits: The limits replayed, None without any.
        ended_at: Seconds on the study's clock at which the quota would have ended it; None when
            it would not have.
        ended_by: The resource that would have been used up, None likewise.
        notes: What could not be replayed, in words.
    """

    def __init__(
        self, study: Study, *, quota: Quota | None = None, limits: Limits | None = None
    ) -> None:
        self._study = study
        self.quota = quota
        self.limits = limits
        self._before = courses_of(study)
        after = [under_limits(c, limits) if limits else c for c in self._before]
        end, self.ended_by = math.inf, None
        if quota:
            after, end, self.ended_by = under_quota(after, quota)
        self.ended_at = end if self.ended_by else None
        self._after = after
        self.notes = list(_notes(self._before, quota, limits))

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each trial that ran.

        The columns are ``number``, ``outcome`` (how it ended), ``fate`` (``kept``,
        ``terminated`` or ``not run``), ``by`` (the resource that decides), ``scope`` (``limit``
        or ``quota``), ``seconds`` (how long it would have run), ``saved_trial_time``,
        ``saved_cpu_time``, ``saved_gpu_time``, ``saved_energy`` (NaN where the use is unknown),
        and ``lost`` (whether it completed and would not have).
        """
        import pandas as pd

        pairs = list(zip(self._before, self._after, strict=True))
        columns = {
            "number": pd.Series([c.number for c in self._after], dtype="int64"),
            "outcome": pd.Series([c.outcome for c in self._after], dtype="object"),
            "fate": pd.Series([c.fate for c in self._after], dtype="object"),
            "by": pd.Series([c.by for c in self._after], dtype="object"),
            "scope": pd.Series([c.scope for c in self._after], dtype="object"),
            "seconds": pd.Series([c.seconds for c in self._after], dtype="float64"),
        }
        for name in _TOTALS:
            saved = [_saved(before, after, name) for before, after in pairs]
            columns[f"saved_{name}"] = pd.Series(saved, dtype="float64")
        lost = [before.outcome == "completed" and after.fate != "kept" for before, after in pairs]
        columns["lost"] = pd.Series(lost, dtype="bool")
        table: pd.DataFrame = pd.DataFrame(columns)
        return table

    @cached_property
    def saved(self) -> dict[str, float]:
        """What would have been saved, by resource, in SI base units, as far as it is known."""
        totals = {name: self.table[f"saved_{name}"] for name in _TOTALS}
        return {name: float(t.sum()) for name, t in totals.items() if t.notna().any()}

    @property
    def lost(self) -> list[int]:
        """Numbers of the trials that completed and would not have."""
        return [int(n) for n in self.table.loc[self.table["lost"], "number"]]

    @property
    def terminated(self) -> list[int]:
        """Numbers of the trials that would have been terminated."""
        return [c.number for c in self._after if c.fate == "terminated"]

    @property
    def not_run(self) -> list[int]:
        """Numbers of the trials that the quota would have left no room for."""
        return [c.number for c in self._after if c.fate == "not run"]

    @cached_property
    def best(self) -> list[int]:
        """Number of the best trial of the study, or those of the Pareto front."""
        return best_numbers(self._study)

    @property
    def best_lives(self) -> bool | None:
        """Whether the best trial (all of the Pareto front) would have completed; None without."""
        if not self.best:
            return None
        return not set(self.best) & set(self.lost)

    @cached_property
    def best_left(self) -> list[int]:
        """Number of the best among the trials that would have completed, or the front of those."""
        return best_numbers(self._study, without=set(self.lost))

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
            self._fates_text(),
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

    def _fates_text(self) -> str:
        counts: dict[str, int] = {}
        for course in self._after:
            if course.fate == "terminated" and course.by:
                by = f"{get_resource(course.by).title} ({course.scope})"
                counts[by] = counts.get(by, 0) + 1
        causes = ", ".join(f"{count} by {by}" for by, count in counts.items())
        return (
            f"{counted(len(self.terminated), 'trial')} would have been terminated"
            f"{f': {causes}' if causes else ''}; "
            f"{counted(len(self.lost), 'completed trial')} would have been lost."
        )

    def _saved_text(self) -> str:
        parts = []
        for name, saved in self.saved.items():
            total = sum(_used(c, name) or 0.0 for c in self._before)
            if saved > 0:
                share = f"{100 * saved / total:.0f}% of" if total else "of"
                amounts = f"{format_amount(name, saved)} ({share} {format_amount(name, total)})"
                parts.append(f"{get_resource(name).title} {amounts}")
        return f"Saved: {', '.join(parts)}." if parts else "Nothing would have been saved."

    def _best_text(self) -> str:
        if self.best_lives is None:
            return "No trial of the study completed, so there is no best trial to lose."
        if len(self.best) > 1:
            front = len(set(self.best) - set(self.lost))
            return f"Of the Pareto front's {len(self.best)} trials {front} would have lived."
        if self.best_lives:
            return f"The best trial ({self.best[0]}) would have lived."
        if not self.best_left:
            return f"The best trial ({self.best[0]}) would have been lost, as all others."
        values = {t.number: t.values for t in self._study.get_trials(deepcopy=False)}
        was, left = (values[n][0] for n in (self.best[0], self.best_left[0]))
        return (
            f"The best trial ({self.best[0]}, {was:.6g}) would have been lost; the best of the "
            f"others is trial {self.best_left[0]} ({left:.6g})."
        )

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return (
            f"<ReplayReport: {len(self.terminated)} terminated, {len(self.not_run)} not run, "
            f"{len(self.lost)} lost of {len(self._before)} trials>"
        )


def replay(
    study: Study, *, quota: Quota | None = None, limits: Limits | None = None
) -> ReplayReport:
    """Return what a quota and limits would have done to a study that has run.

    Example:

        .. code-block:: python

            report = replay(study, limits=Limits(memory="4GiB"), quota=Quota(cpu_time="2h"))
            print(report)
            report.best_lives, report.saved

    A limit stops a trial when its memory timeline passed it, or for a total when even growth over
    the trial reaches it; where neither is known, at the trial's end, so that what is saved is
    never overstated. A study that ran without this library has its wall times alone. Points that
    a sampler would have drawn instead can't be known and are not counted.

    Args:
        study: Any Optuna study.
        quota: Ceilings on the whole study.
        limits: Ceilings on each trial.

    Raises:
        ValueError: If neither a quota nor limits are given.
        TypeError: If one of them is of another type.
    """
    if quota is not None and not isinstance(quota, Quota):
        raise TypeError(f"`quota` must be a Quota but got {quota!r}.")
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"`limits` must be Limits but got {limits!r}.")
    if not quota and not limits:
        raise ValueError("`quota` or `limits` must be given and set something, to be replayed.")
    return ReplayReport(study, quota=quota, limits=limits)


def _used(course: Course, resource: str) -> float | None:
    if resource == "trial_time":
        return course.amounts.get("wall_time")
    return course.amounts.get(resource)


def _saved(before: Course, after: Course, resource: str) -> float:
    used = _used(before, resource)
    if used is None:
        return math.nan
    share = (
        after.seconds / before.seconds if before.seconds > 0 else float(after.fate != "not run")
    )
    return used * (1 - share)


def _notes(courses: Sequence[Course], quota: Quota | None, limits: Limits | None) -> list[str]:
    notes = []
    asked = {**(quota.amounts() if quota else {}), **(limits.amounts() if limits else {})}
    for resource in asked:
        known = sum(_known(c, resource) for c in courses)
        if courses and known < len(courses) and resource not in ("n_trials", "cost"):
            who = "No trial has" if not known else f"{len(courses) - known} trials have no"
            notes.append(
                f"{who}{' a' if not known else ''} known {get_resource(resource).title}: "
                "there it could not be replayed."
            )
    ended = [c for c in courses if c.outcome == "terminated"]
    if ended and limits:
        notes.append(
            f"{counted(len(ended), 'trial')} had been terminated already; how they would have "
            "gone on under wider limits is unknown."
        )
    return notes


def _known(course: Course, resource: str) -> bool:
    return _used(course, resource) is not None
