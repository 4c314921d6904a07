"""Where the budget went, and what its end bought."""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.courses import Course
from optuna_quota._analysis.courses import courses_of
from optuna_quota._analysis.fronts import signs
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import OUTCOMES


if TYPE_CHECKING:
    from optuna_quota._analysis.report import UtilizationReport


_MIN_TRIALS = 20


def advise_budget(report: UtilizationReport) -> Iterator[Advice]:
    """Say how the time of the trials was shared among completed, pruned, terminated, failed."""
    for resource in ("cpu_time", "wall_time"):
        amounts = report.data.amounts(resource)
        known = np.isfinite(amounts)
        if known.sum() < 2 or known.sum() < 0.9 * len(known) or not amounts[known].sum() > 0:
            continue
        total = float(amounts[known].sum())
        spent = {o: float(amounts[known & (report.data.ended == o)].sum()) for o in OUTCOMES}
        shares = {outcome: part / total for outcome, part in spent.items()}
        shown = ", ".join(f"{share:.0%} to {o}" for o, share in shares.items() if share > 0)
        resource = "trial_time" if resource == "wall_time" else resource
        text = (
            f"Of {format_amount(resource, total)} of {get_resource(resource).title}, "
            f"{shown} trials."
        )
        yield Advice("budget", text, {"resource": resource, "total": total, "shares": shares})
        return


def advise_last_tenth(report: UtilizationReport) -> Iterator[Advice]:
    """Say how far the last tenth of what was spent brought the best value."""
    if "value" not in report.table:
        return
    resource, total = _budget(report)
    courses = [c for c in courses_of(report.study) if _spent(c, resource) is not None]
    courses.sort(key=lambda c: (c.end, c.number))
    spent = np.cumsum([_spent(c, resource) or 0.0 for c in courses])
    if len(courses) < _MIN_TRIALS or spent[-1] < 0.9 * total or not total > 0:
        return
    values = _best_so_far(report, courses)
    late = spent > 0.9 * min(total, float(spent[-1]))
    before, after = values[~late], values[-1]
    if not len(before) or not math.isfinite(before[-1]) or not math.isfinite(after):
        return
    whose = (
        f"{get_resource(resource).title} quota"
        if resource in report.quota
        else (f"{get_resource(resource).title} spent")
    )
    found = float(spent[int(np.argmax(values == after))] / spent[-1])
    sign = float(signs(report.study)[0])
    if after < before[-1]:
        bought = f"brought the best value from {sign * before[-1]:.6g} to {sign * after:.6g}"
    else:
        bought = f"bought nothing: the best value stood after {max(found, 0.01):.0%} of it"
    text = f"The last tenth of the {whose} ({int(late.sum())} of {len(late)} trials) {bought}."
    yield Advice(
        "last tenth",
        text,
        {
            "resource": resource,
            "n_trials": int(late.sum()),
            "best_before": sign * float(before[-1]),
            "best_after": sign * float(after),
            "best_found_at": found,
        },
    )


def _budget(report: UtilizationReport) -> tuple[str, float]:
    """The total quota that was used most, or the trial time that was spent."""
    used = {
        name: float(np.nansum(report.data.amounts(column))) / report.quota[name]
        for name, column in (("trial_time", "wall_time"), ("cpu_time", "cpu_time"))
        if name in report.quota
    }
    if used:
        most = max(used, key=lambda name: used[name])
        return most, report.quota[most]
    return "trial_time", float(np.nansum(report.data.amounts("wall_time")))


def _spent(course: Course, resource: str) -> float | None:
    return course.amounts.get("wall_time" if resource == "trial_time" else resource)


def _best_so_far(report: UtilizationReport, courses: list[Course]) -> np.ndarray:
    """The best value when each trial had ended, as a loss; inf before any had completed."""
    table = report.table
    losses = table["value"].to_numpy(dtype=float) * signs(report.study)[0]
    done = (report.data.ended == "completed") & report.feasible
    by_number = dict(zip(table["number"][done], losses[done], strict=True))
    found = np.array([by_number.get(c.number, math.inf) for c in courses])
    return np.minimum.accumulate(found)
