"""Advice on limits, parallelism and budget, given only where the data support it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study

from optuna_quota._analysis.replay import traces_of, TrialTrace
from optuna_quota._limits import Limits
from optuna_quota._resources import format_amount, get_resource, HELD_RESOURCES, OUTCOMES
from optuna_quota._table import DataFrame
from optuna_quota._utilization.data import best_numbers, is_feasible, loss_signs, StudyData


# A trial counts as near the best within this share of the best value.
TOLERANCE = 0.01
# Fewer trials don't support advice on limits.
_MIN_COMPLETED = 10
# Suggested limits are the maximum times this factor.
_MARGIN = 1.1
_MIB = 2**20
# Larger amounts are not rounded: the result could exceed the largest float.
_LARGEST_ROUNDED = 1e30
# Below this, CPU time over wall time is mostly rounding.
_MIN_SECONDS = 0.1
_MAX_JOBS = 256
_DRAWS = 4000
_MAX_CHANCE = 0.05
_REQUESTED = ("memory", "wall_time", "gpu_memory")
_COSTS = ("gpu_time", "cpu_time", "wall_time", "memory")
_MIN_TRIALS_OF_TENTH = 20


@dataclass(frozen=True)
class Advice:
    """One finding that a user can act on.

    Attributes:
        topic: ``requests``, ``search space``, ``n_jobs``, ``budget`` or ``last tenth``.
        text: A sentence or two; ``str()`` of the advice.
        figures: The figures behind it, by name, in SI base units.
        snippets: Lines to paste: ``kubernetes``, ``sbatch``.
    """

    topic: str
    text: str
    figures: Mapping[str, Any]
    snippets: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StudyFacts:
    """The data behind advice; arrays have the shape ``(n_trials,)``."""

    study: Study
    data: StudyData  # the finished trials as arrays
    quota: Mapping[str, float]  # the study's, by resource, in SI base units

    @property
    def table(self) -> DataFrame:
        return self.data.table

    @cached_property
    def sign(self) -> float:
        """1 where the first objective is minimized, -1 where it is maximized."""
        return float(loss_signs(self.study)[0])

    @cached_property
    def traces(self) -> list[TrialTrace]:
        """The trials that ran, in the order of their starts."""
        return traces_of(self.data.trials, self.data.records)

    @cached_property
    def best(self) -> list[int]:
        """Number of the best completed trial, or those of the Pareto front."""
        return best_numbers(self.study, self.data.trials)

    @cached_property
    def feasible(self) -> NDArray[np.bool_]:
        """Which trials violate no constraint and have finite values."""
        found = (bool(t.values) and is_feasible(t) for t in self.data.trials)
        return np.fromiter(found, dtype=bool)

    @cached_property
    def completed(self) -> NDArray[np.bool_]:
        return np.asarray(self.data.ended == "completed", dtype=bool)

    @cached_property
    def values(self) -> NDArray[np.float64] | None:
        """Objective values; None with several objectives."""
        return self.table["value"].to_numpy(dtype=float) if "value" in self.table else None

    @cached_property
    def near_best(self) -> NDArray[np.bool_]:
        """Which feasible trials have ``|value - best| <= 1% · |best|``; else the Pareto front."""
        near: NDArray[np.bool_] = np.isin(self.table["number"].to_numpy(), self.best)
        if self.values is None or not near.any():
            return near
        best = self.values[near][0]
        with np.errstate(invalid="ignore"):
            within = np.abs(self.values - best) <= TOLERANCE * abs(best)
        near |= within & self.completed & self.feasible
        return near

    @cached_property
    def cost(self) -> str | None:
        """A total of the quota, or else a time or memory: the first known of ten trials."""
        totals = ["wall_time" if q == "trial_time" else q for q in self.quota]
        for name in [*(n for n in totals if n not in HELD_RESOURCES), *_COSTS]:
            if name in self.data.resources:
                known = self.table[name][self.completed].dropna()
                if len(known) >= _MIN_COMPLETED and known.max() > 0:
                    return name
        return None

    def peaks(self, resource: str) -> NDArray[np.float64]:
        """Return the known peaks of a resource over the completed trials, shape ``(n,)``."""
        if resource == "cpu_cores":
            seconds = self.table["wall_time"].to_numpy(dtype=float)
            cpu_time = self.table["cpu_time"].to_numpy(dtype=float)
            values = cpu_time / np.where(seconds >= _MIN_SECONDS, seconds, math.nan)
        else:
            values = self.data.amounts(resource)
        return np.asarray(values[self.completed & np.isfinite(values)])


def advise(facts: StudyFacts) -> list[Advice]:
    """Return all advice except on the search space, the most useful first."""
    topics = (_advise_requests, _advise_jobs, _advise_budget, _advise_last_tenth)
    return [advice for topic in topics for advice in topic(facts)]


def _advise_requests(facts: StudyFacts) -> Iterator[Advice]:
    known = facts.table.loc[facts.completed, list(_REQUESTED)]
    greatest = known.max()[(known.count() >= _MIN_COMPLETED) & (known.max() > 0)]
    maxima = {str(name): float(amount) for name, amount in greatest.items()}
    if not maxima:
        return
    enough = {name: _rounded_up(name, _MARGIN * amount) for name, amount in maxima.items()}
    limits = Limits.from_amounts(enough)
    busy = facts.peaks("cpu_cores")
    if len(busy) >= _MIN_COMPLETED:
        # As many cores as 95% of the trials kept busy.
        enough["cpu_cores"] = float(max(1, math.ceil(float(np.quantile(busy, 0.95)) - 0.05)))
    n_completed = len(known)
    share_held = _share_held(len(known[list(maxima)].dropna()), len(maxima))
    holds = (
        f"Holds for at least {math.floor(100 * share_held)}% of further trials like the completed "
        "ones (95% confidence)."
    )
    used = " and ".join(format_amount(name, amount) for name, amount in maxima.items())
    text = (
        f"{limits!r} would have held all {n_completed} completed trials with at least "
        f"{_MARGIN - 1:.0%} to spare (at most {used} used). {holds}"
    )
    # A trial terminated for the quota does not show what a trial needs.
    stopped = [t.breach for t in facts.traces if t.outcome == "terminated" and t.breach]
    ended = sum(breach.resource in maxima and not breach.quota for breach in stopped)
    if ended:
        those = "one that was" if ended == 1 else f"{ended} that were"
        text += f" The {those} terminated may have needed more."
    yield Advice(
        "requests",
        text,
        {
            "n_completed": n_completed,
            "greatest": maxima,
            "enough": enough,
            "share_held": share_held,
        },
        # With the share as a comment, which is pasted along with the snippet.
        {kind: f"{lines}\n# {holds}" for kind, lines in _snippets(enough).items() if lines},
    )


def _share_held(n: int, n_resources: int) -> float:
    """Return which share of further trials stays below all maxima of n trials, at least.

    With confidence 95% and no assumption about the distribution (Wilks, Annals of Mathematical
    Statistics 12, 1941; for several resources together Tukey, ibid. 18, 1947: each removes one
    block of n + 1 that are equally likely). The margin above the maxima comes on top.
    """
    from scipy.special import betaincinv

    return float(betaincinv(n - n_resources + 1, n_resources, 0.05)) if n >= n_resources else 0.0


def _rounded_up(resource: str, amount: float) -> float:
    if amount >= _LARGEST_ROUNDED:
        return min(amount, sys.float_info.max)
    if resource == "wall_time":
        step = 60.0 if amount > 300 else 1.0
        return math.ceil(amount / step) * step
    return float(_whole_mebibytes(amount) * _MIB)


def _whole_mebibytes(amount: float) -> int:
    """Mebibytes, rounded up to about three digits."""
    count = max(1, math.ceil(amount / _MIB))
    step = int(10 ** max(0, len(str(count)) - 3))
    return -(-count // step) * step


def _snippets(enough: Mapping[str, float]) -> dict[str, str]:
    """Requests for one trial at a time: a container's resources, a batch job's options.

    A container has no limit on time, so its resources are empty where only that is known.
    """
    requests, limits, options = [], [], []
    if "memory" in enough:
        mebibytes = _whole_mebibytes(enough["memory"])
        limits.append(f"    memory: {mebibytes}Mi")
        requests += limits
        options.append(f"--mem={mebibytes}M")
    if "cpu_cores" in enough:
        requests.insert(0, f'    cpu: "{enough["cpu_cores"]:.0f}"')
        options.append(f"--cpus-per-task={enough['cpu_cores']:.0f}")
    if "gpu_memory" in enough:
        limits.append("    nvidia.com/gpu: 1")
        options.append("--gres=gpu:1")
    if "wall_time" in enough:
        minutes = max(1, math.ceil(enough["wall_time"] / 60))
        options.append(f"--time={minutes // 60:02d}:{minutes % 60:02d}:00")
    limits = ["  limits:", *limits] if limits else []
    container = ["resources:", "  requests:", *requests, *limits]
    is_timed_alone = enough.keys() <= {"wall_time"}
    return {
        "kubernetes": "" if is_timed_alone else "\n".join(container),
        "sbatch": f"#SBATCH {' '.join(options)}",
    }


def _advise_jobs(facts: StudyFacts) -> Iterator[Advice]:
    for resource in HELD_RESOURCES:
        quota, peaks = facts.quota.get(resource), facts.peaks(resource)
        if quota is None or len(peaks) < _MIN_COMPLETED or peaks.max() <= 0:
            continue
        greatest = float(peaks.max())
        sure = min(_MAX_JOBS, int(quota // greatest))
        likely, chance = _likely_jobs(peaks, quota)
        shown = f"the {get_resource(resource).title} quota of {format_amount(resource, quota)}"
        most = f"at most {format_amount(resource, greatest)} a trial"
        over = f"n_jobs={likely} exceeds it {chance:.1%} of the time"
        if sure:
            text = f"n_jobs={sure} always fits {shown} ({most})"
            text += f"; {over}." if likely > sure else "."
        elif likely:
            text = f"No number of jobs always fits {shown} ({most}); {over}."
        else:
            text = f"Even a single trial may not fit {shown} ({most})."
        yield Advice(
            "n_jobs",
            text,
            {
                "resource": resource,
                "quota": quota,
                "greatest": greatest,
                "n_jobs_sure": sure,
                "n_jobs": max(likely, sure),
                "chance_over": chance if likely > sure else 0.0,
            },
        )


def _likely_jobs(peaks: NDArray[np.float64], quota: float) -> tuple[int, float]:
    """Return how many trials exceed the quota in at most 5% of draws, and in what share.

    Trials are drawn with replacement, by a generator with a fixed seed: the same study gets the
    same advice.
    """
    rng = np.random.default_rng(0)
    together, jobs, chance = np.zeros(_DRAWS), 0, 0.0
    while jobs < _MAX_JOBS:
        together += rng.choice(peaks, _DRAWS)
        over = float((together > quota).mean())
        if over > _MAX_CHANCE:
            break
        jobs, chance = jobs + 1, over
    return jobs, chance


def _advise_budget(facts: StudyFacts) -> Iterator[Advice]:
    for resource in ("cpu_time", "wall_time"):
        amounts = facts.data.amounts(resource)
        known = np.isfinite(amounts)
        total = float(amounts[known].sum())
        if known.sum() < max(2, 0.9 * len(known)) or not 0 < total < math.inf:
            continue
        spent = {o: float(amounts[known & (facts.data.ended == o)].sum()) for o in OUTCOMES}
        shares = {outcome: amount / total for outcome, amount in spent.items()}
        resource = "trial_time" if resource == "wall_time" else resource
        first, *others = ((o, share) for o, share in shares.items() if share > 0)
        if not others:
            return
        text = f"{first[1]:.0%} of {get_resource(resource).title} went to {first[0]} trials"
        text += "".join(f", {share:.0%} to {outcome} ones" for outcome, share in others)
        yield Advice(
            "budget", f"{text}.", {"resource": resource, "total": total, "shares": shares}
        )
        return


def _advise_last_tenth(facts: StudyFacts) -> Iterator[Advice]:
    resource, budget = _budget(facts)
    traces = [t for t in facts.traces if t.used(resource) is not None]
    traces.sort(key=lambda t: (t.end, t.number))
    spent = np.cumsum([t.used(resource) or 0.0 for t in traces])
    too_few = len(traces) < _MIN_TRIALS_OF_TENTH or spent[-1] < 0.9 * budget
    if facts.values is None or too_few or not budget > 0:
        return
    valued = facts.completed & facts.feasible
    value_of = dict(zip(facts.table["number"][valued], facts.values[valued], strict=True))
    own = np.array([facts.sign * value_of.get(t.number, facts.sign * math.inf) for t in traces])
    losses = np.minimum.accumulate(own)
    late = spent > 0.9 * min(budget, float(spent[-1]))
    before, after = losses[~late], losses[-1]
    if not len(before) or not math.isfinite(before[-1]) or not math.isfinite(after):
        return
    title = f"{get_resource(resource).title} {'quota' if resource in facts.quota else 'spent'}"
    found_at = float(spent[int(np.argmax(losses == after))] / spent[-1])
    best_before, best_after = facts.sign * float(before[-1]), facts.sign * float(after)
    # The best of trials in random order is among the last k of n with probability k / n.
    ended = np.isfinite(own)
    chance = float((late & ended).sum() / max(ended.sum(), 1))
    if after < before[-1]:
        effect = (
            f"improved the best value from {best_before:.6g} to {best_after:.6g}; in random "
            f"order, these trials would do so in {chance:.0%} of cases"
        )
    else:
        effect = (
            "improved nothing: the best value was found after "
            f"{max(found_at, 0.01):.0%} of it. In random order, these trials would do so in "
            f"{1 - chance:.0%} of cases"
        )
    yield Advice(
        "last tenth",
        f"The last tenth of the {title} ({int(late.sum())} of {len(late)} trials) {effect}.",
        {
            "resource": resource,
            "n_trials": int(late.sum()),
            "best_before": best_before,
            "best_after": best_after,
            "best_found_at": found_at,
            "chance_of_improving": chance,
        },
    )


def _budget(facts: StudyFacts) -> tuple[str, float]:
    """Return the total quota that was used most, or else the trial time that was spent."""
    used = {
        name: float(np.nansum(facts.data.amounts(column))) / facts.quota[name]
        for name, column in (("trial_time", "wall_time"), ("cpu_time", "cpu_time"))
        if name in facts.quota
    }
    if used:
        most = max(used, key=lambda name: used[name])
        return most, facts.quota[most]
    return "trial_time", float(np.nansum(facts.data.amounts("wall_time")))
