"""Ask-and-tell: the loop is the user's own, and ``check`` stands where a trial may be stopped.

``suggest_*`` raises TrialRejected for a point that would most likely not fit, ``check`` raises
LimitBreached for a trial that is over a limit. Both end the trial as pruned.
"""

from __future__ import annotations

import numpy as np
import optuna

from optuna_quota import (
    check,
    LimitBreached,
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    trial_table,
    TrialRejected,
)


if __name__ == "__main__":
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(n_trials=8)),
        pruner=QuotaPruner(limits=Limits(memory="500MiB")),
    )
    while True:
        try:
            trial = study.ask()
        except QuotaExhausted as error:
            print(f"Ended: {error}")
            break
        try:
            rows = trial.suggest_int("rows", 100, 20_000, log=True)
            kernel = np.ones((rows, 500))
            check(trial)
            inner = kernel @ kernel.T if rows < 9000 else np.ones((9000, 9000))
            check(trial)
        except (TrialRejected, LimitBreached) as error:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            print(f"Trial {trial.number}: {error}")
            continue
        study.tell(trial, [1 / rows, float(inner.nbytes)])
        del kernel, inner
    print(trial_table(study)[["number", "memory", "cpu_time", "outcome"]])
