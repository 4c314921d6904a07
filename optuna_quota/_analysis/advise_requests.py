"""Limits and requests that would have been enough."""

from __future__ import annotations

from collections.abc import Iterator
import math
import sys
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota._analysis.advice import Advice
from optuna_quota._records import read_record
from optuna_quota._resources import format_amount
from optuna_quota._resources import Limits


if TYPE_CHECKING:
    from optuna_quota._analysis.report import UtilizationReport


# From fewer trials the greatest use says little of the next trials'.
MIN_COMPLETED = 10
# What is asked for stands so much above the greatest use that was seen.
MARGIN = 1.1
_MIB = 2**20
# Nothing is rounded that large: it may be the largest number there is.
_BEYOND = 1e30


def advise_requests(report: UtilizationReport) -> Iterator[Advice]:
    """Say what would have held every completed trial, as limits and as a cluster's requests."""
    completed = report.table[report.data.ended == "completed"]
    known = {
        name: completed[name].dropna()
        for name in ("memory", "wall_time", "gpu_memory")
        if completed[name].notna().sum() >= MIN_COMPLETED
    }
    greatest = {name: float(values.max()) for name, values in known.items() if values.max() > 0}
    if not greatest:
        return
    enough = {name: _rounded_up(name, MARGIN * amount) for name, amount in greatest.items()}
    cores = _cores(report)
    if cores:
        enough["cpu_cores"] = cores
    yield Advice(
        "requests",
        _text(report, greatest, enough, len(completed)),
        {"n_completed": len(completed), "greatest": greatest, "enough": enough},
        {"kubernetes": _kubernetes(enough), "sbatch": _sbatch(enough)},
    )


def _text(
    report: UtilizationReport,
    greatest: dict[str, float],
    enough: dict[str, float],
    n_completed: int,
) -> str:
    limits = Limits.from_amounts({name: enough[name] for name in greatest})
    used = " and ".join(format_amount(name, amount) for name, amount in greatest.items())
    text = (
        f"{limits!r} would have held all {n_completed} completed trials with at least "
        f"{MARGIN - 1:.0%} to spare (at most {used} used)."
    )
    breaches = (read_record(trial).breach for trial in report.study.get_trials(deepcopy=False))
    # What was left of a quota says nothing of what the trial itself needs.
    ended = sum(b is not None and b.resource in greatest and not b.quota for b in breaches)
    those = "one that was" if ended == 1 else f"{ended} that were"
    return f"{text} The {those} terminated may have needed more." if ended else text


def _rounded_up(resource: str, amount: float) -> float:
    if amount >= _BEYOND:
        return min(amount, sys.float_info.max)
    if resource == "wall_time":
        step = 60.0 if amount > 300 else 1.0
        return math.ceil(amount / step) * step
    return float(_whole_mebibytes(amount) * _MIB)


def _cores(report: UtilizationReport) -> float | None:
    """Cores that 95% of the completed trials kept busy on average or fewer, rounded up."""
    table = report.table[report.data.ended == "completed"]
    busy = (table["cpu_time"] / table["wall_time"].where(table["wall_time"] >= 0.1)).dropna()
    if len(busy) < MIN_COMPLETED:
        return None
    return float(max(1, math.ceil(float(np.quantile(busy, 0.95)) - 0.05)))


def _whole_mebibytes(amount: float) -> int:
    """Mebibytes, rounded up to about three digits."""
    count = max(1, math.ceil(amount / _MIB))
    step = int(10 ** max(0, len(str(count)) - 3))
    return -(-count // step) * step


def _kubernetes(enough: dict[str, float]) -> str:
    lines = ["resources:", "  requests:"]
    if "cpu_cores" in enough:
        lines.append(f'    cpu: "{enough["cpu_cores"]:.0f}"')
    if "memory" in enough:
        lines.append(f"    memory: {_whole_mebibytes(enough['memory'])}Mi")
    if "memory" in enough or "gpu_memory" in enough:
        lines.append("  limits:")
    if "memory" in enough:
        lines.append(f"    memory: {_whole_mebibytes(enough['memory'])}Mi")
    if "gpu_memory" in enough:
        lines.append("    nvidia.com/gpu: 1")
    return "\n".join(lines)


def _sbatch(enough: dict[str, float]) -> str:
    """Options for a job that runs one trial at a time; ``--time`` is that of one trial."""
    options = []
    if "memory" in enough:
        options.append(f"--mem={_whole_mebibytes(enough['memory'])}M")
    if "cpu_cores" in enough:
        options.append(f"--cpus-per-task={enough['cpu_cores']:.0f}")
    if "gpu_memory" in enough:
        options.append("--gres=gpu:1")
    if "wall_time" in enough:
        minutes = max(1, math.ceil(enough["wall_time"] / 60))
        options.append(f"--time={minutes // 60:02d}:{minutes % 60:02d}:00")
    return f"#SBATCH {' '.join(options)}"
