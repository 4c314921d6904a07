"""The deadline of a worker: parse it, and decide whether another trial may start before it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
import os
import re
import subprocess
from typing import TypeAlias

from optuna_quota._ledger.grant import Refusal
from optuna_quota._units import format_seconds, parse_seconds


DeadlineOption: TypeAlias = "float | str | timedelta | datetime"

# Seconds; a later deadline may be out of range for dates and for waiting threads.
_FURTHEST = 100 * 365 * 86400.0
# Seconds that SLURM's commands get to answer.
_SLURM_TIMEOUT = 60.0
_END_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def parse_deadline(
    value: DeadlineOption, now: float, environment: Mapping[str, str] = os.environ
) -> float:
    """Return a deadline in seconds since the epoch.

    A datetime without a zone is in local time.

    Raises:
        ValueError: If it is no duration, has passed, or the end of a SLURM job is unknown.
        TypeError: If it is of another type.
    """
    if value == "slurm":
        return _end_of_slurm_job(environment)
    if not isinstance(value, datetime):
        try:
            deadline = now + parse_seconds(value, "deadline")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} Give a point in time as a datetime.") from None
    elif (deadline := value.timestamp()) <= now:
        raise ValueError(f"`deadline` must be in the future but got {value}.")
    return min(deadline, now + _FURTHEST)


def refuse_late(
    deadline: float, now: float, likely: float | None, margin: float
) -> Refusal | None:
    """Return the refusal of a trial that would most likely not finish before the deadline.

    Running trials are stopped ``margin`` seconds before the deadline; ``likely`` is the expected
    duration of a trial. ``deadline`` and ``now`` are in seconds since the epoch.
    """
    left = deadline - now
    if left > margin and (likely is None or likely <= left - margin):
        return None
    time = f"{datetime.fromtimestamp(deadline):%Y-%m-%d %H:%M:%S}"
    if left <= 0:
        reason = f"The deadline ({time}) has passed."
    elif left <= margin:
        reason = f"The deadline ({time}) is in {format_seconds(left)}."
    else:
        reason = (
            f"{format_seconds(left)} are left until the deadline ({time}), the last "
            f"{format_seconds(margin)} of them to stop trials, and a trial most likely takes "
            f"{format_seconds(likely or 0.0)}."
        )
    needed, left = likely or 0.0, max(0.0, left)
    return Refusal(
        "wall_time", needed, left, needed, reason=reason, final=True, by_deadline=True, of_any=True
    )


def _end_of_slurm_job(environment: Mapping[str, str]) -> float:
    given = environment.get("SLURM_JOB_END_TIME", "")
    if given.isdecimal() and int(given) > 0:
        return float(given)
    job = environment.get("SLURM_JOB_ID")
    if not job:
        raise ValueError(
            '`deadline="slurm"` needs a SLURM job, but neither SLURM_JOB_END_TIME nor '
            "SLURM_JOB_ID is set. Pass a duration or a datetime instead."
        )
    answers = []
    for command in (
        ["squeue", "--noheader", "--jobs", job, "--format", "%e"],
        ["scontrol", "show", "job", job],
    ):
        answer = _output(command, environment)
        # The answer of `scontrol` has the start time as well.
        found = _END_TIME.search(answer.rpartition("EndTime=")[2])
        if found is not None:
            return datetime.fromisoformat(found.group()).timestamp()
        answers.append(f"{command[0]} said {' '.join(answer.split())[:200]!r}")
    raise ValueError(
        f'`deadline="slurm"` needs the end of SLURM job {job}, but {" and ".join(answers)}. '
        "Pass a duration or a datetime instead, or start the job with a time limit."
    )


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    try:
        return subprocess.run(
            command,
            env={**environment, "SLURM_TIME_FORMAT": "standard"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SLURM_TIMEOUT,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
