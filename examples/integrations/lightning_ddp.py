"""Lightning with two ranks (DDP, on the CPU) inside an isolated trial, on any storage.

Lightning hands the callback, and with it the trial, to its ranks. Rank 0 reports, and all stop
together. The strategy must be ``ddp_spawn`` or ``ddp_fork``: ``ddp`` would run the whole script,
with its study, once more for each rank; for it see ``lightning_script.py``.
"""

from __future__ import annotations

import os

import lightning
from lightning_model import train
import optuna

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


class Pruning(lightning.Callback):
    """Reports the validation loss, and stops all ranks when the trial is to be pruned."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        stop = False
        if trainer.is_global_zero:
            self.trial.report(float(trainer.callback_metrics["val_loss"]), trainer.current_epoch)
            stop = self.trial.should_prune()
        trainer.should_stop = trainer.strategy.broadcast(stop)


def objective(trial: optuna.Trial) -> float:
    """Return the validation loss after two epochs."""
    trainer = train(
        trial.suggest_int("width", 8, 512, log=True),
        trial.suggest_float("rate", 1e-4, 1e-1, log=True),
        max_epochs=2,
        devices=2,
        strategy="ddp_fork",
        callbacks=[Pruning(trial)],
    )
    if trial.should_prune():
        raise optuna.TrialPruned
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(cpu_time="5min")),
        pruner=QuotaPruner(optuna.pruners.MedianPruner(), limits=Limits(memory="4GiB")),
    )
    study.optimize(isolated(objective), n_trials=2)
    for trial in study.trials:
        print(f"trial {trial.number}: {sorted(trial.intermediate_values)}")
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
