"""Options of QuotaSampler: their ranges and types; deadlines."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optuna_quota import Quota, QuotaSampler
from optuna_quota._sampler.options import checked_gpus_per_trial, parse_deadline


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"breach_probability": 0},
        {"breach_probability": 1.1},
        {"on_veto": "other"},
        {"audits": -0.1},
        {"audits": 2},
        {"confidence": 0.5},
        {"confidence": 1},
    ],
)
def test_options_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        QuotaSampler(quota=Quota(n_trials=1), **arguments)


@pytest.mark.parametrize("value", ["0.9", True, None, [0.9], 1j])
@pytest.mark.parametrize("name", ["breach_probability", "confidence", "audits"])
def test_options_that_are_no_numbers_are_refused(name: str, value: Any) -> None:
    if (name, value) != ("audits", None):
        with pytest.raises(TypeError, match=f"`{name}` must be .* but got"):
            QuotaSampler(quota=Quota(n_trials=1), **{name: value})


@pytest.mark.parametrize(
    "arguments",
    [{"one_gpu": 2}, {"one_gpu": "no"}, {"meters": 1}, {"meters": "steps"}, {"n_candidates": 2.0}],
)
def test_options_of_the_wrong_type_are_refused(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(TypeError, match=f"`{name}` must be .* but got"):
        QuotaSampler(quota=Quota(n_trials=1), **arguments)


def test_counts_may_be_numpys() -> None:
    QuotaSampler(quota=Quota(n_trials=1), n_candidates=np.int64(3))
    found = checked_gpus_per_trial(np.int64(2), False)
    assert type(found) is int and found == 2


@pytest.mark.parametrize(
    ("value", "seconds"), [(90, 90.0), ("2h", 7200.0), (timedelta(minutes=1), 60.0)]
)
def test_a_deadline_from_now_on(value: Any, seconds: float) -> None:
    assert parse_deadline(value, NOW) == NOW + seconds


def test_a_datetime() -> None:
    at = datetime.fromtimestamp(NOW) + timedelta(hours=1)
    assert parse_deadline(at, NOW) == NOW + 3600
    assert parse_deadline(at.astimezone(timezone.utc), NOW) == NOW + 3600
    with pytest.raises(ValueError, match="in the future"):
        parse_deadline(at, NOW + 7200)


def fake_slurm(folder: Path, **commands: str) -> dict[str, str]:
    for name, text in commands.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def test_the_end_of_a_slurm_job(tmp_path: Path) -> None:
    end = datetime.fromtimestamp(NOW)
    answer = f"echo {end:%Y-%m-%dT%H:%M:%S}"
    environment = {"SLURM_JOB_END_TIME": str(int(NOW))}
    assert parse_deadline("slurm", 0.0, environment) == NOW
    assert parse_deadline("slurm", 0.0, fake_slurm(tmp_path, squeue=answer)) == NOW
    shown = f"echo 'StartTime=2001-01-01T00:00:00 EndTime={end:%Y-%m-%dT%H:%M:%S} Deadline=N/A'"
    both = fake_slurm(tmp_path, squeue="exit 1", scontrol=shown)
    assert parse_deadline("slurm", 0.0, both) == NOW


def test_no_end_of_a_slurm_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a SLURM job"):
        parse_deadline("slurm", NOW, {})
    endless = fake_slurm(tmp_path, squeue="echo N/A", scontrol="echo EndTime=Unknown")
    with pytest.raises(ValueError, match="SLURM job 17, but squeue said 'N/A'"):
        parse_deadline("slurm", NOW, endless)
