"""transformers' Trainer inside an isolated trial: a hard memory limit, and pruning by a callback.

``hyperparameter_search``, see ``transformers_search.py``, trains in this process. Here each model
has a process to itself, and what it leaves behind ends with it.
"""

from __future__ import annotations

import tempfile
from typing import Any

import optuna
from transformers import Trainer, TrainerCallback
from transformers_model import arguments, classifier, sentences

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


class Pruning(TrainerCallback):
    """Reports each evaluation, and ends the trial when it is to be pruned."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trial.report(kwargs["metrics"]["eval_loss"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(trial: optuna.Trial) -> float:
    """Return the evaluation loss after six steps."""
    width = trial.suggest_categorical("width", [16, 32, 64])
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=classifier(width),
            args=arguments(folder, learning_rate=rate),
            train_dataset=sentences(64),
            eval_dataset=sentences(32),
            callbacks=[Pruning(trial)],
        )
        trainer.train()
        losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
        return float(losses[-1])


if __name__ == "__main__":
    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(cpu_time="10min")),
        pruner=QuotaPruner(
            optuna.pruners.MedianPruner(n_startup_trials=2),
            limits=Limits(memory="4GiB", wall_time="2min"),
        ),
    )
    study.optimize(isolated(objective), n_trials=3)
    print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
