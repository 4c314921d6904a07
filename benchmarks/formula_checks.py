"""Whether formulas are believed that should not be, on simulated studies of four parameters.

Memory follows a floor plus a power law, a sum of two terms (which no power law is), or no
hyperparameter at all. Shown are: in how many tables the formula is called wrong by its comparison
with the footprint at trials left out, in how many any term counts as clear before and after
adjustment for all tests, and the median errors of formula and footprint at trials left out. Ten
tables take about a minute on a free core.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from optuna_quota import analyze


SPACE = {
    "rows": FloatDistribution(100, 10_000, log=True),
    "width": FloatDistribution(16, 1024, log=True),
    **{name: FloatDistribution(1e-5, 1e-1, log=True) for name in ("rate", "decay")},
}
LAWS = {
    "power law": lambda p: 3e8 + 50 * p["rows"] ** 2,
    "sum of lines": lambda p: 2e8 + 8e4 * p["rows"] + 9e5 * p["width"],
    "sum of squares": lambda p: 1e8 + 5 * p["rows"] ** 2 + 3e2 * p["width"] ** 2,
    "noise": lambda p: 5e8,
}


def study_of(law, n, noise, rng):
    study = optuna.create_study()
    for _ in range(n):
        bounds = {name: (math.log(d.low), math.log(d.high)) for name, d in SPACE.items()}
        params = {name: math.exp(rng.uniform(*ends)) for name, ends in bounds.items()}
        usage = {"quota:memory": law(params) * rng.lognormal(0, noise)}
        study.add_trial(
            create_trial(params=params, distributions=SPACE, value=0.0, user_attrs=usage)
        )
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=10)
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--noise", type=float, default=0.05)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for n in arguments.trials:
        for name, law in LAWS.items():
            rng = np.random.default_rng(n)
            wrong, clear, adjusted, errors = 0, 0, 0, []
            for _ in range(arguments.tables):
                report = analyze(study_of(law, n, arguments.noise, rng))
                error, terms = report.prediction_errors["memory"], report.models["memory"]
                wrong += error.is_wrong
                clear += bool((terms.coefficients["p_value"] < 0.05).any())
                adjusted += bool((terms.coefficients["p_adjusted"] < 0.05).any())
                errors.append((error.formula, error.footprint))
            formula, footprint = 100 * np.median(errors, axis=0)
            print(
                f"n = {n:<4}{name:<15}called wrong in {wrong} of {arguments.tables}; a clear term "
                f"in {clear}, adjusted {adjusted}; errors {formula:.1f} and {footprint:.1f}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
