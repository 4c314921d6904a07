"""transformers' ``hyperparameter_search``: sampler and pruner go to ``create_study``.

The Trainer calls ``should_prune`` at each evaluation; it runs in this process, so the stop is a
cooperative one.
"""

from __future__ import annotations

import tempfile
from typing import Any

import optuna
from transformers import BertForSequenceClassification, Trainer
from transformers_model import arguments, classifier, sentences

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def model_init(trial: optuna.Trial | None) -> BertForSequenceClassification:
    """Return a tiny model; its width is tuned."""
    return classifier(32 if trial is None else trial.suggest_categorical("width", [16, 32, 64]))


def search_space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the arguments of the Trainer that are tuned."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model_init=model_init,
            args=arguments(folder),
            train_dataset=sentences(64),
            eval_dataset=sentences(32),
        )
        trainer.hyperparameter_search(
            hp_space=search_space,
            backend="optuna",
            direction="minimize",
            n_trials=3,
            storage=f"sqlite:///{folder}/search.db",
            study_name="transformers",
            sampler=QuotaSampler(
                optuna.samplers.TPESampler(seed=0), quota=Quota(trial_time="5min")
            ),
            pruner=QuotaPruner(limits=Limits(memory="4GiB", wall_time="1min")),
        )
        study = optuna.load_study(
            study_name="transformers", storage=f"sqlite:///{folder}/search.db"
        )
        print(trial_table(study)[["number", "value", "memory", "cpu_time", "outcome"]])
