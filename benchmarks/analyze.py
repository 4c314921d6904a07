"""Time of `analyze` with its whole summary on studies of 100, 1,000 and 20,000 trials.

The studies have six hyperparameters and three resources, and a fifth of the trials was terminated.
Compared are a script by hand (`scipy.stats.spearmanr` for each pair and a log-log OLS with HC3 for
each resource, without floors, lower bounds, interactions and advice), and reading the study.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial, TrialState

from optuna_quota import analyze, trial_table


SPACE = {
    "rows": IntDistribution(100, 10_000, log=True),
    "width": IntDistribution(16, 1024, log=True),
    "layers": IntDistribution(1, 8),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "dropout": FloatDistribution(0.0, 0.5),
    "optimizer": CategoricalDistribution(["sgd", "adam", "lion"]),
}


def study_of(n: int) -> optuna.Study:
    """Return a study whose usage follows a formula."""
    rng = np.random.default_rng(n)
    study = optuna.create_study()
    trials = [trial_of(rng) for _ in range(n)]
    study.add_trials(trials)
    return study


def trial_of(rng: np.random.Generator) -> optuna.trial.FrozenTrial:
    params = {
        "rows": int(np.exp(rng.uniform(np.log(100), np.log(10_000)))),
        "width": int(np.exp(rng.uniform(np.log(16), np.log(1024)))),
        "layers": int(rng.integers(1, 9)),
        "lr": float(np.exp(rng.uniform(np.log(1e-5), np.log(1e-1)))),
        "dropout": float(rng.uniform(0, 0.5)),
        "optimizer": str(rng.choice(["sgd", "adam", "lion"])),
    }
    memory = 3e8 + 8 * params["rows"] ** 2 + 40 * params["layers"] * params["width"] ** 2
    memory *= float(np.exp(0.05 * rng.standard_normal()))
    seconds = 1e-4 * params["rows"] * params["width"] ** 0.7 * float(np.exp(0.2 * rng.normal()))
    usage = {"quota:memory": memory, "quota:wall_time": seconds, "quota:cpu_time": 2 * seconds}
    if memory < 7e8:
        attributes = {**usage, "quota:outcome": "completed"}
        value = float((np.log(params["lr"]) + 7) ** 2 + 0.1 * rng.normal())
        return create_trial(value=value, params=params, distributions=SPACE, user_attrs=attributes)
    breach = {"resource": "memory", "limit": 7e8, "observed": 7e8, "seconds": seconds / 3}
    usage = {"quota:memory": 7e8, "quota:wall_time": seconds / 3, "quota:cpu_time": seconds / 2}
    attributes = {**usage, "quota:outcome": "terminated", "quota:breach": breach}
    return create_trial(
        state=TrialState.PRUNED, params=params, distributions=SPACE, user_attrs=attributes
    )


def whole_report(study: optuna.Study) -> None:
    """Compute all of a report but its footprint, which is the online model."""
    report = analyze(study)
    report.summary()


def by_hand(study: optuna.Study) -> None:
    """Spearman for each pair, and OLS on logs with HC3 for each resource."""
    from scipy.stats import spearmanr
    import statsmodels.api as sm

    table = trial_table(study)
    numbers = ["rows", "width", "layers", "lr", "dropout"]
    x = table[[f"params_{n}" for n in numbers]].to_numpy(dtype=float)
    for resource in ("memory", "wall_time", "cpu_time"):
        y = table[resource].to_numpy()
        for column in x.T:
            spearmanr(column, y)
        exog = np.column_stack([np.log(np.maximum(x, 1e-12)), table["params_optimizer"] == "adam"])
        sm.OLS(np.log(y), sm.add_constant(exog)).fit(cov_type="HC3").summary()


CASES = {"analyze, whole report": whole_report, "by hand": by_hand, "trial_table": trial_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition, no 20,000")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sizes = [100, 1000] if arguments.quick else [100, 1000, 20_000]
    for case in CASES.values():
        case(study_of(60))  # imports
    print(
        f"{'trials':>7}  {'':<24}{'clock, s':>10}{'CPU, s':>9}{'CPU a trial, ms':>17}"
        f"{'CPU / by hand':>16}"
    )
    for n in sizes:
        study = study_of(n)
        repetitions = 1 if arguments.quick else 5 if n < 5000 else 3
        medians = {name: medians_of(case, study, repetitions) for name, case in CASES.items()}
        for name, (clock, cpu) in medians.items():
            ratio = cpu / medians["by hand"][1]
            print(
                f"{n:>7}  {name:<24}{clock:>10.3f}{cpu:>9.3f}{1e3 * cpu / n:>17.3f}{ratio:>16.2f}"
            )


def medians_of(case, study: optuna.Study, repetitions: int) -> tuple[float, float]:
    """Return the median clock time and CPU time in seconds."""
    clock, cpu = zip(*(seconds_of(case, study) for _ in range(repetitions)), strict=True)
    return statistics.median(clock), statistics.median(cpu)


def seconds_of(case, study: optuna.Study) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    case(study)
    return time.perf_counter() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main()
