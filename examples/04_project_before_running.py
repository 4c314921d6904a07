"""Will it fit? Projecting a strategy before anything runs.

A first, small study measures what points cost. From it the footprint of any other point is known,
with an interval, and so is the footprint of a whole strategy: whether 300 trials fit a quota, with
which probability, and which nearest strategy would. A study that does not fit is rejected before
its objective is called once.

Run it with ``python examples/04_project_before_running.py``; it takes about half a minute.
"""

from __future__ import annotations

import optuna
from optuna.distributions import IntDistribution
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

from optuna_quota import (
    analyze,
    isolated,
    Limits,
    project,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    StudyRejected,
)


SPACE = {
    "n_estimators": IntDistribution(5, 200, log=True),
    "max_depth": IntDistribution(2, 20),
}


def objective(trial: optuna.Trial) -> float:
    """Return the cross-validated accuracy of a random forest on the digits."""
    model = RandomForestClassifier(
        trial.suggest_int("n_estimators", 5, 200, log=True),
        max_depth=trial.suggest_int("max_depth", 2, 20),
        random_state=0,
    )
    return float(cross_val_score(model, *load_digits(return_X_y=True), cv=3).mean())


def main() -> None:
    """Learn footprints, project two strategies, and try to run the one that does not fit."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pilot = optuna.create_study(
        direction="maximize",
        sampler=QuotaSampler(optuna.samplers.RandomSampler(seed=0), quota=Quota(n_trials=16)),
        pruner=QuotaPruner(limits=Limits(memory="1GiB")),
    )
    pilot.optimize(isolated(objective), n_trials=16)
    footprint = analyze(pilot).footprint

    quota = Quota(cpu_time="3min", memory="1GiB")
    for n_trials in (50, 1000):
        strategy = Strategy(n_trials, n_jobs=2, search_space=SPACE)
        print(f"\n{n_trials} trials:")
        print(project(strategy, footprint, quota=quota))

    print("\nStarting the study of 1000 trials all the same:")
    try:
        study = optuna.create_study(
            direction="maximize",
            sampler=QuotaSampler(
                quota=quota,
                strategy=Strategy(1000, n_jobs=2, search_space=SPACE),
                footprint=footprint,
            ),
        )
        study.optimize(isolated(objective), n_trials=1000, n_jobs=2)
    except StudyRejected as error:
        print(f"StudyRejected: {error}")


if __name__ == "__main__":
    main()
