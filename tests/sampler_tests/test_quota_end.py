"""Near the end of a quota, points are judged by what is left of it."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
import pytest

from optuna_quota import Quota, QuotaExhausted, QuotaSampler, status, TrialRejected, Usage
from optuna_quota._footprint.observations import Observation
from optuna_quota._footprint.user_given import UserFootprint
from optuna_quota._records import read_record
from optuna_quota._sampler.study_footprint import Margins, margins_of


def cores_of(params: dict[str, Any]) -> Usage:
    return Usage(cpu_time=params["size"])


def run(sampler: BaseSampler, quota: Quota, n_jobs: int = 1) -> optuna.Study:
    """Run trials that report what their footprint says, as if each took its time."""
    study = optuna.create_study(
        sampler=QuotaSampler(sampler, quota=quota, footprint=cores_of, metering="reported")
    )

    def objective(trial: optuna.Trial) -> float:
        size = trial.suggest_float("size", 1.0, 20.0)
        time.sleep(0.01)
        trial.set_user_attr("quota:cpu_time", size)
        return size

    study.optimize(objective, n_trials=300, n_jobs=n_jobs)
    return study


@pytest.mark.parametrize("n_jobs", [1, 4])
@pytest.mark.parametrize("kind", [RandomSampler, TPESampler])
def test_a_known_footprint_uses_the_quota_and_never_exceeds_it(
    kind: Callable[..., BaseSampler], n_jobs: int, quota_warnings: Callable[[], list[str]]
) -> None:
    study = run(kind(seed=0), Quota(cpu_time=100), n_jobs)
    completed = study.get_trials(states=(TrialState.COMPLETE,))
    used = sum(trial.params["size"] for trial in completed)
    assert 90 < used <= 100 * (1 + 1e-9)
    assert status(study).table.loc["cpu_time", "used"] == pytest.approx(used)
    [end] = [text for text in quota_warnings() if "The study ends here" in text]
    assert "The quota of 1 min 40 s of CPU time" in end


@pytest.mark.slow
def test_a_study_ends_where_each_total_has_room_but_no_point_fits_all(
    quota_warnings: Callable[[], list[str]],
) -> None:
    def both(params: dict[str, Any]) -> Usage:
        return Usage(cpu_time=params["size"], gpu_time=21 - params["size"])

    def objective(trial: optuna.Trial) -> float:
        used = both({"size": trial.suggest_float("size", 1.0, 20.0)})
        trial.set_user_attr("quota:cpu_time", used.cpu_time)
        trial.set_user_attr("quota:gpu_time", used.gpu_time)
        return 0.0

    quota = Quota(cpu_time=100, gpu_time=100)
    sampler = QuotaSampler(RandomSampler(seed=0), quota=quota, footprint=both, metering="reported")
    study = optuna.create_study(sampler=sampler)
    for _ in range(9):
        study.enqueue_trial({"size": 10.5})
    # Of both, 5.5 s are left, and any other point needs 21 s of the two together.
    study.optimize(objective, n_trials=300)
    outcomes = [read_record(t).outcome for t in study.trials]
    assert outcomes == ["completed"] * 9 + ["rejected"] * 20
    [end] = [text for text in quota_warnings() if "The study ends here" in text]
    assert "points did not fit what is left" in end
    # Only a trial with parameters of its own is judged from here on.
    with pytest.raises(QuotaExhausted, match="did not fit"):
        study.ask()
    study.enqueue_trial({"size": 20.0})
    trial = study.ask()
    with pytest.raises(TrialRejected):
        trial.suggest_float("size", 1.0, 20.0)


def test_what_is_refused_says_what_was_left() -> None:
    study = run(GridSampler({"size": [12.0, 2.0, 14.0, 13.0]}, seed=0), Quota(cpu_time=20))
    refused = [t for t in study.trials if read_record(t).outcome == "rejected" and t.params]
    assert refused
    for trial in refused:
        reason = read_record(trial).reason or ""
        assert reason.startswith("CPU time quota likely exceeded: ") and " left, " in reason
    used = sum(t.params["size"] for t in study.get_trials(states=(TrialState.COMPLETE,)))
    assert used <= 20


def test_the_margins_are_what_trials_used_beyond_the_footprint() -> None:
    margins = Margins(factors={"cpu_time": 2.0}, extras={"cpu_time": 1.0})
    assert margins.need("cpu_time", 3.0) == 7
    assert margins.within({"cpu_time": 7.0}) == {"cpu_time": 3}
    assert margins.within({"cpu_time": 0.5})["cpu_time"] > 0
    assert margins_of(UserFootprint(cores_of), []) == Margins()
    stated = UserFootprint(cores_of, lenient=True)
    rows = [
        Observation(params, {}, Usage(cpu_time=5.0)) for params in ({"size": 2.0}, {"other": 1.0})
    ]
    # The function fails for the last one.
    assert margins_of(stated, rows) == Margins(extras={"cpu_time": 3.0})
