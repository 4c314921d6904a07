"""Odd studies have a report without errors, warnings or NaN."""

from __future__ import annotations

from collections.abc import Callable
import math
import random
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial, TrialState
import pytest

from optuna_quota import analyze, Limits, Quota, replay, trial_table, Usage
from optuna_quota._records import TrialRecord
from optuna_quota._usage import Breach
from tests.analysis_tests.studies import finished, power_law_study, study_of, terminated
from tests.visualization_tests.studies import add_row, empty_study, MIB


ONE = {"x": FloatDistribution(0.0, 1.0)}
POINT: dict[str, Any] = {"rows": 100, "width": 20, "lr": 1e-3, "optimizer": "sgd"}


def empty() -> optuna.Study:
    return optuna.create_study()


def only_running_and_waiting() -> optuna.Study:
    study = optuna.create_study()
    study.ask({"x": FloatDistribution(0, 1)})
    study.enqueue_trial({"x": 0.5})
    return study


def all_failed() -> optuna.Study:
    return study_of(
        *(
            create_trial(state=TrialState.FAIL, params={"x": i / 20}, distributions=ONE)
            for i in range(20)
        )
    )


def all_rejected() -> optuna.Study:
    attrs = {"quota:outcome": "rejected", "quota:reason": "It would not fit."}
    return study_of(*(create_trial(state=TrialState.FAIL, user_attrs=attrs) for _ in range(9)))


def all_terminated() -> optuna.Study:
    rng = np.random.default_rng(0)
    return study_of(
        *(
            terminated(
                {"x": float(rng.random())}, Usage(memory=1e9, wall_time=1.0), "memory", 1e9, ONE
            )
            for _ in range(30)
        )
    )


def one_trial() -> optuna.Study:
    return power_law_study(1)


def one_completed_of_many_terminated() -> optuna.Study:
    study = all_terminated()
    study.add_trial(finished({"x": 0.5}, Usage(memory=1e6, wall_time=1.0), ONE))
    return study


def constant_parameters() -> optuna.Study:
    return study_of(*(finished(POINT, Usage(memory=1e9 + i, cpu_time=1.0 + i)) for i in range(30)))


def constant_usage() -> optuna.Study:
    return study_of(
        *(finished({**POINT, "rows": 100 + i}, Usage(memory=1e9, cpu_time=1.0)) for i in range(30))
    )


def two_distinct_values() -> optuna.Study:
    return study_of(
        *(
            finished({**POINT, "rows": 100 + 900 * (i % 2)}, Usage(memory=1e9 * (1 + i % 2)))
            for i in range(30)
        )
    )


def no_usage_at_all() -> optuna.Study:
    return study_of(
        *(finished(POINT, Usage(), datetime_start=None) for _ in range(0)),
        *(create_trial(value=1.0, params={"x": 0.1}, distributions=ONE) for _ in range(10)),
    )


def zero_usage() -> optuna.Study:
    rng = np.random.default_rng(0)
    usage = Usage(memory=0.0, gpu_time=0.0, wall_time=0.0)
    return study_of(*(finished({"x": float(rng.random())}, usage, ONE) for _ in range(20)))


def sometimes_zero() -> optuna.Study:
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished({"x": float(rng.random())}, Usage(gpu_time=float(i % 2) * (i + 1)), ONE)
            for i in range(30)
        )
    )


def values_not_finite() -> optuna.Study:
    study = power_law_study(0)
    for i, trial in enumerate(power_law_study(30).trials):
        study.add_trial(
            create_trial(
                value=[math.inf, -math.inf, 1.0][i % 3],
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
            )
        )
    return study


def usage_not_finite() -> optuna.Study:
    attrs = [{"quota:memory": math.nan}, {"quota:memory": math.inf, "quota:cpu_time": -1}]
    return study_of(
        *(
            create_trial(
                value=1.0, params={"x": i / 40}, distributions=ONE, user_attrs=attrs[i % 2]
            )
            for i in range(40)
        )
    )


def foreign_attributes() -> optuna.Study:
    attrs: dict[str, Any] = {
        "quota:memory": {"bytes": 3},
        "quota:footprint": "much",
        "quota:breach": {"resource": 3},
        "quota:outcome": "exploded",
        "quota:timeline": [[1], "x", [1, 2, 3]],
        "quota:new_thing": [1, 2],
        "quota:memory:peak": 3.0,
        "memory": "1GB",
        "rss": 12.0,
    }
    study = study_of(*(create_trial(value=1.0, user_attrs=attrs) for _ in range(12)))
    study.set_user_attr("quota:quota", "2h")
    study.set_user_attr("quota:limits", {"memory": "4GiB", "wall_time": -1, "disk": 3})
    return study


def gigabytes_and_terabytes() -> optuna.Study:
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished(
                {**POINT, "rows": int(r)},
                Usage(memory=2e9 * (r / 100) ** 1.5, wall_time=float(r) * 1e4),
            )
            for r in rng.integers(100, 10_000, 40)
        )
    )


def tiny_usage() -> optuna.Study:
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished({"x": float(x)}, Usage(memory=1.0 + x, cpu_time=1e-9 * (1 + x)), ONE)
            for x in rng.random(40)
        )
    )


def run_without_this_library() -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", ["a", "b", None, True])
        x = trial.suggest_float("x", -1.0, 1.0)
        if kind == "a":
            x += trial.suggest_int("n", 0, 5)
        if trial.number % 7 == 6:
            raise optuna.TrialPruned
        if trial.number % 11 == 10:
            raise ArithmeticError
        return x

    study.optimize(objective, n_trials=40, catch=(ArithmeticError,))
    return study


def odd_names() -> optuna.Study:
    rng = np.random.default_rng(0)
    names = ["a b", "x:y", "lr[0]", "Größe", "floor", "constant", "", "log(sigma)", "a" * 200]
    space = {name: FloatDistribution(0.1, 1.0) for name in names}
    return study_of(
        *(
            finished({n: float(rng.uniform(0.1, 1)) for n in names}, Usage(memory=1e9 + i), space)
            for i in range(60)
        )
    )


def changing_space() -> optuna.Study:
    rng = np.random.default_rng(0)
    trials = []
    for i in range(60):
        high = 10 * (1 + i)
        space = {"x": IntDistribution(1, high), "kind": CategoricalDistribution(["a", f"b{i}"])}
        params = {"x": int(rng.integers(1, high + 1)), "kind": ["a", f"b{i}"][i % 2]}
        trials.append(finished(params, Usage(memory=1e6 * params["x"]), space))
    return study_of(*trials[:1], *trials[2::2])


def many_levels() -> optuna.Study:
    space = {"seed": CategoricalDistribution([f"s{i}" for i in range(50)])}
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished({"seed": f"s{i}"}, Usage(memory=1e9 * float(rng.uniform(1, 2))), space)
            for i in range(50)
        )
    )


def copies() -> optuna.Study:
    space = {name: FloatDistribution(1.0, 10.0) for name in ("a", "b", "c")}
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished(dict.fromkeys("abc", float(x)), Usage(memory=1e9 * float(x)), space)
            for x in rng.uniform(1, 10, 30)
        )
    )


def perfect_fit() -> optuna.Study:
    return power_law_study(40, noise=0.0)


def separated() -> optuna.Study:
    """Lower bounds on one side of a parameter only, values on the other."""
    trials = []
    for i in range(40):
        params = {"x": i / 40}
        if i < 20:
            trials.append(finished(params, Usage(memory=1e8 * (1 + i % 3)), ONE))
        else:
            trials.append(terminated(params, Usage(memory=4e8), "memory", 4e8, ONE))
    return study_of(*trials)


def heavy_tails() -> optuna.Study:
    rng = np.random.default_rng(0)
    return study_of(
        *(
            finished({"x": float(rng.random())}, Usage(memory=float(1e6 * np.exp(6 * z))), ONE)
            for z in rng.standard_t(1.2, 60).clip(-4, 4)
        )
    )


ODD: list[Callable[[], optuna.Study]] = [
    empty,
    only_running_and_waiting,
    all_failed,
    all_rejected,
    all_terminated,
    one_trial,
    one_completed_of_many_terminated,
    constant_parameters,
    constant_usage,
    two_distinct_values,
    no_usage_at_all,
    zero_usage,
    sometimes_zero,
    values_not_finite,
    usage_not_finite,
    foreign_attributes,
    gigabytes_and_terabytes,
    tiny_usage,
    run_without_this_library,
    odd_names,
    changing_space,
    many_levels,
    copies,
    perfect_fit,
    separated,
    heavy_tails,
]


SLOW = [changing_space, copies, gigabytes_and_terabytes, perfect_fit, tiny_usage]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=[pytest.mark.slow] if make in SLOW else [], id=make.__name__)
        for make in ODD
    ],
)
def test_analyze_odd_studies(make: Callable[[], optuna.Study]) -> None:
    study = make()
    report = analyze(study)

    text = report.summary()

    assert text and "Traceback" not in text
    assert not any(word in text.lower().split() for word in ("nan", "inf", "-inf", "+nan"))
    assert max(map(len, text.splitlines())) <= 100
    assert len(report.table) == len([t for t in study.trials if t.state.is_finished()])
    for model in report.models.values():
        assert np.isfinite(model.coefficients["estimate"]).all()
        with warnings.catch_warnings():
            # Some releases of SciPy warn of few observations here, others do not.
            warnings.filterwarnings("ignore", message=".*kurtosistest")
            assert str(model.results.summary())


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_replay_odd_studies(make: Callable[[], optuna.Study]) -> None:
    limits = Limits(memory="1MB", wall_time="1ms", cpu_time="1ms", custom={"disk": 1})
    quota = Quota(n_trials=3, trial_time="1s", cost=1, prices={"cpu_time": 1}, memory="1GB")

    report = replay(make(), limits=limits, quota=quota)

    assert str(report) and set(report.table["fate"]) <= {"kept", "terminated", "not run"}


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_trial_table_of_odd_studies(make: Callable[[], optuna.Study]) -> None:
    study = make()

    assert len(trial_table(study)) == len(study.trials)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (empty, "no trial has finished, nothing to analyze yet"),
        (all_terminated, "No model of memory: 0 trials were observed to their end, 8 are needed."),
        (one_trial, "No model of memory: 1 trial was observed to its end, 8 are needed."),
        (constant_parameters, "No model of memory: no hyperparameter varied."),
        (constant_usage, "No model of memory: every trial used the same."),
        (no_usage_at_all, "finished: 10 completed"),
        (all_rejected, "No trial has a known usage"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_summary_says_what_is_missing(make: Callable[[], optuna.Study], sentence: str) -> None:
    assert sentence in " ".join(analyze(make()).summary().split())


def test_nothing_drives_what_all_trials_used_alike() -> None:
    assert "memory" not in analyze(constant_usage()).drivers


def test_a_nearly_perfect_fit_has_no_negative_variance() -> None:
    # Rounding made one negative here, and its square root warned.
    space = {"megabytes": IntDistribution(1, 400), "kind": CategoricalDistribution(["a", "b"])}
    study, rng = empty_study(limits=Limits(memory="300MiB")), random.Random(28)
    for _ in range(22):
        megabytes = rng.randint(1, 400)
        params = {"megabytes": megabytes, "kind": rng.choice("ab")}
        held = (12 + megabytes) * MIB + rng.randint(0, 200000)
        if megabytes > 285:
            breach = Breach("memory", 300.0 * MIB, 301.0 * MIB, 0.3)
            usage = Usage(memory=301 * MIB, wall_time=0.3, cpu_time=0.1)
            record = TrialRecord(usage=usage, outcome="terminated", breach=breach)
        else:
            wall, cpu = 0.3 + rng.random() * 0.1, 0.1 + megabytes * 0.0005
            usage = Usage(memory=held, wall_time=wall, cpu_time=cpu)
            record = TrialRecord(usage=usage, outcome="completed")
        add_row(study, record, params=params, space=space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "megabytes" in analyze(study).models["memory"].formula
