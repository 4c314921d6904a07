"""Fitted exponents beside those that theory gives, on real trials.

Without arguments it runs two small real workloads, each trial in a process of its own: a kernel
method (its memory is quadratic in rows, its CPU time cubic where the factorization rules) and a
matrix product (quadratic in memory, cubic in time). With ``--tables DIR`` it also reads trial
tables, one JSON object a line with ``params``, ``distributions``, ``wall_s``, ``cpu_s`` and
``peak_rss_bytes``, in files named after their workloads. Beside the fitted model stands the usual
one, a log-log OLS without a floor. Theory is asymptotic: the last column is the exponent among the
half of the trials that used most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import json_to_distribution
from optuna.trial import create_trial

from optuna_quota import analyze, isolated, Quota, QuotaSampler


# workload, resource, parameter, exponent by theory, why
THEORY = [
    ("kernel", "memory", "rows", 2.0, "the kernel matrix"),
    ("kernel", "cpu_time", "rows", 3.0, "its factorization (2 where filling it rules)"),
    ("product", "memory", "size", 2.0, "three matrices"),
    ("product", "cpu_time", "size", 3.0, "the product"),
    ("product", "cpu_time", "repeats", 1.0, "as often"),
    ("gp", "memory", "rows", 2.0, "kernel matrices"),
    ("gp", "cpu_time", "rows", 3.0, "their factorization (2 where filling them rules)"),
    ("mlp", "memory", "width", 2.0, "weights between layers (1: activations)"),
    ("mlp", "memory", "layers", 1.0, "one block of weights each"),
    ("mlp", "cpu_time", "width", 2.0, "products with the weights"),
    ("mlp", "cpu_time", "epochs", 1.0, "as often"),
    ("tfm", "memory", "batch", 1.0, "activations"),
    ("tfm", "memory", "layers", 1.0, "activations of each layer"),
    ("tfm", "memory", "seq_len", 2.0, "attention scores (1: other activations)"),
    ("tfm", "cpu_time", "steps", 1.0, "as often"),
    ("tfm", "cpu_time", "batch", 1.0, "as many sequences"),
    ("rf", "memory", "n_estimators", 1.0, "as many trees"),
    ("rf", "memory", "rows_frac", 1.0, "nodes of a tree"),
    ("rf", "cpu_time", "n_estimators", 1.0, "as many trees"),
    ("lgbm", "memory", "num_leaves", 1.0, "histograms"),
    ("lgbm", "memory", "max_bin", 1.0, "histograms"),
    ("lgbm", "cpu_time", "n_estimators", 1.0, "as many trees"),
    ("cond", "memory", "width", 2.0, "weights of the net"),
    ("cond", "memory", "n_estimators", 1.0, "trees of the forest"),
    ("cond", "cpu_time", "n_estimators", 1.0, "trees of the forest"),
]


def kernel(trial: optuna.Trial) -> float:
    """Ridge regression with a Gaussian kernel."""
    rows = trial.suggest_int("rows", 200, 3000, log=True)
    width = trial.suggest_float("length", 0.3, 30.0, log=True)
    rng = np.random.default_rng(trial.number)
    x, y = rng.standard_normal((rows, 8)), rng.standard_normal(rows)
    gram = np.exp(-((x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T) / (2 * width**2))
    return float(y @ np.linalg.solve(gram + 0.1 * np.eye(rows), y))


def product(trial: optuna.Trial) -> float:
    """Products of square matrices."""
    size = trial.suggest_int("size", 100, 2000, log=True)
    repeats = trial.suggest_int("repeats", 1, 8)
    one = np.random.default_rng(trial.number).standard_normal((size, size))
    other = one.T.copy()
    return float(sum((one @ other)[0, 0] for _ in range(repeats)))


def run(objective, n_trials: int) -> optuna.Study:
    """Return a study of a workload, run now."""
    sampler = QuotaSampler(optuna.samplers.RandomSampler(seed=0), quota=Quota())
    study = optuna.create_study(study_name=objective.__name__, sampler=sampler)
    study.optimize(isolated(objective), n_trials=n_trials)
    return study


def read(path: Path) -> optuna.Study:
    """Return a study of the trials in a table."""
    study = optuna.create_study(study_name=path.stem)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spaces = {n: json_to_distribution(text) for n, text in row["distributions"].items()}
        usage = {
            "quota:memory": row["peak_rss_bytes"],
            "quota:wall_time": row["wall_s"],
            "quota:cpu_time": row["cpu_s"],
            "quota:outcome": "completed",
        }
        study.add_trial(
            create_trial(
                value=row["value"], params=row["params"], distributions=spaces, user_attrs=usage
            )
        )
    return study


def upper_half(study: optuna.Study, resource: str) -> optuna.Study:
    """Return the half of the trials that used most."""
    trials = [t for t in study.trials if f"quota:{resource}" in t.user_attrs]
    trials.sort(key=lambda t: t.user_attrs[f"quota:{resource}"])
    half = optuna.create_study()
    half.add_trials(trials[len(trials) // 2 :])
    return half


def exponent(study: optuna.Study, resource: str, param: str) -> str:
    """Return the exponent with its interval."""
    model = analyze(study).models.get(resource)
    if model is None or param not in model.coefficients.index:
        return "none"
    row = model.coefficients.loc[param]
    return f"{row['estimate']:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"


def without_floor(study: optuna.Study, resource: str, param: str) -> str:
    """Return the slope of a log-log OLS on all positive numbers that every trial has."""
    import statsmodels.api as sm

    table = analyze(study).table
    names = [
        name
        for name in table.columns
        if name.startswith("params_")
        and table[name].dtype.kind in "if"
        and (table[name] > 0).all()
    ]
    if f"params_{param}" not in names:
        return "none"
    logs = np.log(table[names].to_numpy(dtype=float))
    slopes = sm.OLS(np.log(table[resource].to_numpy()), sm.add_constant(logs)).fit().params
    return f"{slopes[1 + names.index(f'params_{param}')]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, help="folder of trial tables, *.jsonl")
    parser.add_argument("--quick", action="store_true", help="16 trials a workload instead of 40")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    n_trials = 16 if arguments.quick else 40
    studies = {f.__name__: run(f, n_trials) for f in (kernel, product)}
    if arguments.tables:
        studies |= {path.stem: read(path) for path in sorted(arguments.tables.glob("*.jsonl"))}
    print(
        f"{'workload':<9}{'resource':<10}{'parameter':<14}{'theory':>7}  {'fitted [95%]':<20}"
        f"{'no floor':>9}  {'largest half':<20} why"
    )
    for workload, resource, param, theory, why in THEORY:
        if workload in studies:
            study = studies[workload]
            half = exponent(upper_half(study, resource), resource, param)
            print(
                f"{workload:<9}{resource:<10}{param:<14}{theory:>7.1f}  "
                f"{exponent(study, resource, param):<20}"
                f"{without_floor(study, resource, param):>9}  {half:<20} {why}"
            )
    for name, study in studies.items():
        for model in analyze(study).models.values():
            print(f"{name}: {model.formula}")


if __name__ == "__main__":
    main()
