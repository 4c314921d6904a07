"""How many trials at once fit what they may hold together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.advise_requests import MIN_COMPLETED
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import HELD_RESOURCES


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quota._analysis.report import UtilizationReport


_MOST_JOBS = 256
_DRAWS = 4000
_CHANCE = 0.05


def advise_jobs(report: UtilizationReport) -> Iterator[Advice]:
    """Say how many trials at once stay below each quota that they hold together."""
    for resource in HELD_RESOURCES:
        quota, peaks = report.quota.get(resource), _peaks(report, resource)
        if quota is None or len(peaks) < MIN_COMPLETED or peaks.max() <= 0:
            continue
        sure = min(_MOST_JOBS, int(quota // peaks.max()))
        likely, chance = _likely(peaks, quota, sure)
        yield Advice(
            "n_jobs",
            _text(resource, quota, peaks, (sure, likely), chance),
            {
                "resource": resource,
                "quota": quota,
                "greatest": float(peaks.max()),
                "n_jobs_sure": sure,
                "n_jobs": max(likely, sure),
                "chance_over": chance,
            },
        )


def _peaks(report: UtilizationReport, resource: str) -> NDArray[np.float64]:
    completed = report.data.ended == "completed"
    if resource == "cpu_cores":
        table = report.table
        busy = table["cpu_time"] / table["wall_time"].where(table["wall_time"] >= 0.1)
        values: NDArray[np.float64] = busy.to_numpy(dtype=float)[completed]
    else:
        values = report.data.amounts(resource)[completed]
    return values[np.isfinite(values)]


def _likely(peaks: NDArray[np.float64], quota: float, sure: int) -> tuple[int, float]:
    """Return the most trials that together exceed the quota in under 5% of draws, and in how many.

    Drawn with replacement from the trials, by a generator of its own seed: the same study gets
    the same advice.
    """
    rng = np.random.default_rng(0)
    together, jobs, chance = np.zeros(_DRAWS), 0, 0.0
    while jobs < _MOST_JOBS:
        together += rng.choice(peaks, _DRAWS)
        over = float((together > quota).mean())
        if over > _CHANCE:
            break
        jobs, chance = jobs + 1, over
    return jobs, chance if jobs > sure else 0.0


def _text(
    resource: str,
    quota: float,
    peaks: NDArray[np.float64],
    jobs: tuple[int, int],
    chance: float,
) -> str:
    sure, likely = jobs
    title, shown = get_resource(resource).title, format_amount(resource, quota)
    greatest = format_amount(resource, float(peaks.max()))
    if max(sure, likely) == 0:
        return (
            f"Not even one trial at a time is sure to fit the {title} quota of {shown}: the "
            f"greatest used {greatest}."
        )
    text = f"n_jobs={sure} always fits the {title} quota of {shown} (at most {greatest} a trial)"
    if likely > sure:
        rarely = f"n_jobs={likely} would be over it {chance:.1%} of the time"
        text = f"{text}; {rarely}" if sure else f"{rarely} (at most {greatest} a trial): {shown}"
    return f"{text}."
