"""Options of QuotaSampler and their validation, and the deadline of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
import os
import re
import subprocess
from typing import Any, get_args, Literal, TYPE_CHECKING, TypeAlias

from optuna_quota._ledger import Refusal
from optuna_quota._limits import Quota, Strategy
from optuna_quota._optuna import misplaced
from optuna_quota._resources import CLOCK_RESOURCES
from optuna_quota._units import format_seconds, parse_seconds


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


Metering = Literal[True, False, "reported"]
OnExhausted = Literal["stop", "raise"]
OnCrowded = Literal["wait", "smaller"]
OnProjected = Literal["continue", "stop", "raise"]
OnVeto = Literal["auto", "redraw", "nearest", "skip"]
DeadlineOption: TypeAlias = "float | str | timedelta | datetime"

# Seconds that SLURM's commands get to answer.
_SLURM_TIMEOUT = 60.0
_END_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


@dataclass(frozen=True)
class SamplerOptions:
    """The options of a QuotaSampler, as each of its parts reads them."""

    base_sampler: BaseSampler
    quota: Quota
    strategy: Strategy | None
    footprint: Any  # what the user stated; None to learn from the study alone
    confidence: float
    breach_probability: float
    on_veto: OnVeto
    audits: float | None
    on_exhausted: OnExhausted
    gpus_per_trial: int | None
    metering: Metering
    lease: float  # seconds
    deadline: float | None  # seconds since the epoch

    @property
    def declared(self) -> Mapping[str, BaseDistribution]:
        """Distributions of all parameters, where the user declared them."""
        return (self.strategy and self.strategy.search_space) or {}

    def __post_init__(self) -> None:
        check_choices(
            on_veto=(self.on_veto, OnVeto),
            on_exhausted=(self.on_exhausted, OnExhausted),
            metering=(self.metering, Metering),
        )
        if not self.metering:
            _check_measurable(self.quota)
        if not 0.5 < self.confidence < 1:
            raise ValueError(
                f"`confidence` must be above 0.5 and below 1 but got {self.confidence!r}."
            )
        if not 0 < self.breach_probability <= 1:
            raise ValueError(
                "`breach_probability` must be above 0 and at most 1 but got "
                f"{self.breach_probability!r}."
            )
        if self.audits is not None and not 0 <= self.audits <= 1:
            raise ValueError(f"`audits` must be a share from 0 to 1 but got {self.audits!r}.")


def checked_gpus_per_trial(gpus_per_trial: int | None, one_gpu: bool) -> int | None:
    """Return how many GPUs each trial gets, None if it sees all; ``one_gpu`` stands for 1."""
    if gpus_per_trial is None:
        return 1 if one_gpu else None
    if isinstance(gpus_per_trial, bool) or not isinstance(gpus_per_trial, int):
        raise TypeError(
            f"`gpus_per_trial` must be a whole number or None but got {gpus_per_trial!r}."
        )
    if gpus_per_trial < 1:
        raise ValueError(f"`gpus_per_trial` must be at least 1 but got {gpus_per_trial}.")
    if one_gpu and gpus_per_trial != 1:
        raise ValueError(
            f"`one_gpu=True` means `gpus_per_trial=1` but got gpus_per_trial={gpus_per_trial}."
        )
    return gpus_per_trial


def _check_measurable(quota: Quota) -> None:
    """Raise ValueError for a quota on more than numbers and times, where no trial is measured."""
    measured = {"n_trials", *CLOCK_RESOURCES}
    if quota.prices.keys() <= measured:
        measured.add("cost")
    unknown = [name for name in quota.amounts() if name not in measured]
    if unknown:
        raise ValueError(
            "`quota` must be of n_trials, wall_time or trial_time with `metering=False`, which "
            f"measures nothing else, but got {quota!r}. Where each trial's row reports its "
            f'{unknown[0]} as "quota:{unknown[0]}" before `tell`, pass `metering="reported"`.'
        )


def check_types(**given: tuple[Any, type]) -> None:
    """Raise TypeError for an option that is neither None nor of its type."""
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"`{name}` must be a {kind.__name__} or None but got {value}.{misplaced(value)}"
            )


def check_choices(**given: tuple[Any, Any]) -> None:
    """Raise ValueError for an option that is not among the choices of its ``Literal``."""
    for name, (value, literal) in given.items():
        choices = get_args(literal)
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"`{name}` must be one of {listed} but got {value!r}.")


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
        return now + parse_seconds(value, "deadline")
    if value.timestamp() <= now:
        raise ValueError(f"`deadline` must be in the future but got {value}.")
    return value.timestamp()


def refuse_late(
    deadline: float, now: float, likely: float | None, margin: float
) -> Refusal | None:
    """Return why no trial starts: it would most likely not be done by the deadline.

    That is so if its ``likely`` seconds end less than the ``margin`` before the deadline, from
    which on running trials are stopped. Times are in seconds since the epoch.
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
    figures = (likely or 0.0, 0.0, 0.0, max(0.0, left))
    return Refusal("wall_time", *figures, reason=reason, final=True)


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
        # That of `scontrol` has the start as well.
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
