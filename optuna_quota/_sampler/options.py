"""Options of QuotaSampler and their validation; the deadline of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from numbers import Integral
import os
import re
import subprocess
from typing import Any, get_args, Literal, TypeAlias

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from optuna_quota import _optuna
from optuna_quota._limits import Quota, Strategy
from optuna_quota._resources import CLOCK_RESOURCES
from optuna_quota._units import check_confidence, check_flags, check_number, parse_seconds


Metering = Literal[True, False, "reported"]
OnExhausted = Literal["stop", "raise"]
OnCrowded = Literal["wait", "smaller"]
OnProjected = Literal["continue", "stop", "raise"]
OnVeto = Literal["auto", "redraw", "nearest", "skip"]
DeadlineOption: TypeAlias = "float | str | timedelta | datetime"

# Samplers that enumerate points or return the same one when asked again. By name, as
# BoTorchSampler is in another package.
_ONE_POINT = {"BoTorchSampler", "BruteForceSampler", "GPSampler", "GridSampler"}
# Seconds; a later deadline may be out of range for dates and for waiting threads.
_FURTHEST = 100 * 365 * 86400.0
# Seconds that SLURM's commands get to answer.
_SLURM_TIMEOUT = 60.0
_END_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


@dataclass(frozen=True)
class SamplerOptions:
    """The options of a QuotaSampler."""

    base_sampler: BaseSampler
    quota: Quota
    strategy: Strategy | None
    footprint: Any  # what the user stated; None to learn from the study alone
    confidence: float
    breach_probability: float
    on_veto: OnVeto
    audits: float | None
    on_exhausted: OnExhausted
    on_crowded: OnCrowded
    on_projected: OnProjected
    gpus_per_trial: int | None
    metering: Metering
    lease: float  # seconds
    deadline: float | None  # seconds since the epoch
    n_candidates: int

    @property
    def declared(self) -> Mapping[str, BaseDistribution]:
        """Distributions of all parameters, where the user declared them."""
        return (self.strategy and self.strategy.search_space) or {}

    def __post_init__(self) -> None:
        _check_choices(
            on_veto=(self.on_veto, OnVeto),
            on_exhausted=(self.on_exhausted, OnExhausted),
            on_crowded=(self.on_crowded, OnCrowded),
            on_projected=(self.on_projected, OnProjected),
            metering=(self.metering, Metering),
        )
        _check_n_candidates(self.n_candidates, self.base_sampler)
        if not self.metering:
            _check_measurable(self.quota)
        check_confidence(self.confidence)
        risk = self.breach_probability
        check_number(risk, "breach_probability", "above 0 and at most 1", lambda p: 0 < p <= 1)
        if self.audits is not None:
            rule = "a share from 0 to 1 or None"
            check_number(self.audits, "audits", rule, lambda share: 0 <= share <= 1)


def checked_gpus_per_trial(gpus_per_trial: int | None, one_gpu: bool) -> int | None:
    """Return how many GPUs each trial gets, None if it sees all; ``one_gpu`` means 1."""
    check_flags(one_gpu=one_gpu)
    if gpus_per_trial is None:
        return 1 if one_gpu else None
    _check_count(gpus_per_trial, "gpus_per_trial", "a whole number or None")
    if one_gpu and gpus_per_trial != 1:
        raise ValueError(
            f"`one_gpu=True` means `gpus_per_trial=1` but got gpus_per_trial={gpus_per_trial}."
        )
    return int(gpus_per_trial)


def _check_n_candidates(n_candidates: int, base_sampler: BaseSampler) -> None:
    _check_count(n_candidates, "n_candidates", "a whole number")
    kind = _optuna.unwrap_partial_fixed(base_sampler)
    names = {base.__name__ for base in type(kind).__mro__}
    if n_candidates > 1 and (names & _ONE_POINT or _optuna.needs_drawn_point(kind)):
        raise ValueError(
            f"`n_candidates` must be 1 with a {type(kind).__name__}, which enumerates points, "
            f"repeats itself or learns from all that it drew, but got {n_candidates}."
        )


def _check_count(value: Any, name: str, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be {allowed} but got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1 but got {value}.")


def _check_measurable(quota: Quota) -> None:
    """Raise ValueError for a quota on resources that are unknown without metering."""
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
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            hint = _optuna.misplaced(value)
            raise TypeError(f"`{name}` must be a {kind.__name__} or None but got {value}.{hint}")


def _check_choices(**given: tuple[Any, Any]) -> None:
    for name, (value, literal) in given.items():
        choices = get_args(literal)
        if not isinstance(value, (str, bool)) or value not in choices:
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
        try:
            deadline = now + parse_seconds(value, "deadline")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} Give a point in time as a datetime.") from None
    elif (deadline := value.timestamp()) <= now:
        raise ValueError(f"`deadline` must be in the future but got {value}.")
    return min(deadline, now + _FURTHEST)


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
