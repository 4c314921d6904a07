"""Lightning with its pruning callback inside an isolated trial."""

from __future__ import annotations

from lightning_model import train
import optuna
from optuna_integration import PyTorchLightningPruningCallback
import torch

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the validation loss after three epochs."""
    torch.set_num_threads(1)
    trainer = train(
        trial.suggest_int("width", 8, 512, log=True),
        trial.suggest_float("rate", 1e-4, 1e-1, log=True),
        max_epochs=3,
        callbacks=[PyTorchLightningPruningCallback(trial, monitor="val_loss")],
    )
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(cpu_time="5min")),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=2), limits=Limits(memory="3GiB")
        ),
    )
    study.optimize(isolated(objective), n_trials=4)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
