"""A training script under ``torchrun`` as an objective: limits and pruning hold for all ranks."""

from __future__ import annotations

from pathlib import Path
import sys

import optuna

from optuna_quota import Limits, QuotaPruner, script, trial_table


TRAIN = Path(__file__).with_name("torchrun_train.py")
# As the command `torchrun`; `--standalone` lets each trial find a free port of its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

if __name__ == "__main__":
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=1),
            limits=Limits(memory="4GiB", wall_time="5min"),
        ),
    )
    objective = script(
        [*TORCHRUN, TRAIN, "--rate={rate}"],
        lambda trial: {"rate": trial.suggest_float("rate", 1e-3, 0.3, log=True)},
        env={"OMP_NUM_THREADS": "1"},
    )
    study.optimize(objective, n_trials=2)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
