"""scikit-learn through OptunaSearchCV: the study carries the sampler and the pruner.

OptunaSearchCV runs its trials in this process, so limits are kept between folds at best. The
quota of the study holds all the same.
"""

from __future__ import annotations

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna_integration import OptunaSearchCV
from sklearn.datasets import load_iris
from sklearn.svm import SVC

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, trial_table


if __name__ == "__main__":
    study = optuna.create_study(
        direction="maximize",
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(trial_time="1min")),
        pruner=QuotaPruner(limits=Limits(memory="2GiB", wall_time="10s")),
    )
    search = OptunaSearchCV(
        SVC(),
        {
            "C": FloatDistribution(1e-3, 1e3, log=True),
            "kernel": CategoricalDistribution(["rbf", "linear"]),
        },
        cv=3,
        n_trials=10,
        study=study,
    )
    search.fit(*load_iris(return_X_y=True))
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
