"""What other limits and quotas would have done to a finished study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import repeat
import math
from typing import TYPE_CHECKING

from optuna_quota._analysis.pareto import best_numbers
from optuna_quota._analysis.summary import counted, wrap
from optuna_quota._analysis.trial_traces import apply_limits, apply_quota, trial_traces, TrialTrace
from optuna_quota._limits import Limits, Quota
from optuna_quota._resources import CHARGED_RESOURCES, format_amount, get_resource


if TYPE_CHECKING:
    from optuna.study import Study
    import pandas as pd


class ReplayReport:
    """What limits and a quota would have done to a study.

    Example:

        .. code-block:: python

            report = replay(study, limits=Limits(memory="2GiB"))
            print(report.saved, report.lost, report.best_lives)

    Attributes:
        quota: The quota replayed, None without one.
        limits: The limits replayed, None without any.
        ended_at: Seconds into the study at which the quota would have ended it; None when it
            would not have.
        ended_by: The resource that would have been used up, None likewise.
        notes: Sentences on what could not be replayed.
    """

    def __init__(
        self, study: Study, *, quota: Quota | None = None, limits: Limits | None = None
    ) -> None:
        self._study = study
        self.quota = quota
        self.limits = limits
        self._before = trial_traces(study)
        after = [apply_limits(t, limits) if limits else t for t in self._before]
        end, self.ended_by = math.inf, None
        if quota:
            after, end, self.ended_by = apply_quota(after, quota)
        self.ended_at = end if self.ended_by else None
        self._after = after
        self.notes = list(_notes(self._before, quota, limits))

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each trial that ran.

        The columns are ``number``, ``outcome`` (in the study), ``fate`` (in the replay: ``kept``,
        ``terminated`` or ``not run``), ``by`` (the resource that decided it), ``scope``
        (``limit`` or ``quota``), ``seconds`` (how long it would have run), ``saved_trial_time``,
        ``saved_cpu_time``, ``saved_gpu_time``, ``saved_energy`` (NaN where the usage is unknown),
        and ``lost`` (whether it completed and would not have).
        """
        import pandas as pd

        names = {"number": "int64", "outcome": "object", "replayed": "object", "by": "object"}
        names |= {"scope": "object", "seconds": "float64"}
        columns = {
            name: pd.Series([getattr(trace, name) for trace in self._after], dtype=dtype)
            for name, dtype in names.items()
        }
        for name in CHARGED_RESOURCES:
            saved = map(_saved, self._before, self._after, repeat(name))
            columns[f"saved_{name}"] = pd.Series(list(saved), dtype="float64")
        table: pd.DataFrame = pd.DataFrame(columns).rename(columns={"replayed": "fate"})
        # The outcome is that of the study, before the replay.
        table["lost"] = (table["outcome"] == "completed") & (table["fate"] != "kept")
        return table

    @cached_property
    def saved(self) -> dict[str, float]:
        """What would have been saved by resource, in SI base units, of known usage."""
        totals = {name: self.table[f"saved_{name}"] for name in CHARGED_RESOURCES}
        return {name: float(t.sum()) for name, t in totals.items() if t.notna().any()}

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
        return best_numbers(self._study)

    @property
    def best_lives(self) -> bool | None:
        """Whether the best trial (all of the Pareto front) would have completed; None without."""
        return not set(self.best) & set(self.lost) if self.best else None

    @cached_property
    def best_left(self) -> list[int]:
        """Number of the best trial that would have completed, or those of the Pareto front."""
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
        counts = Counter(
            f"{get_resource(t.by).title} ({t.scope})"
            for t in self._after
            if t.replayed == "terminated" and t.by
        )
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
        return f"Saved: {', '.join(parts)}." if parts else "Nothing would have been saved."

    def _best_text(self) -> str:
        if self.best_lives is None:
            return "No trial of the study completed, so there is no best trial to lose."
        if len(self.best) > 1:
            kept = len(set(self.best) - set(self.lost))
            return (
                f"{kept} of the {len(self.best)} trials of the Pareto front would have completed."
            )
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
