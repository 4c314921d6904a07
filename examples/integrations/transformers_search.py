"""transformers' ``hyperparameter_search``: sampler and pruner go to ``create_study``.

The model is tiny and randomly initialised, so nothing is downloaded. The Trainer calls
``should_prune`` at each evaluation; it runs in this process, so the stop is a cooperative one.
"""

from __future__ import annotations

import tempfile
from typing import Any

import optuna
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, trial_table


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random token sequences whose label is the parity of their first token."""

    def __init__(self, size: int) -> None:
        tokens = torch.randint(0, 50, (size, 8), generator=torch.Generator().manual_seed(size))
        self.rows = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def model_init(trial: optuna.Trial | None) -> BertForSequenceClassification:
    """Return a tiny model; its width is tuned."""
    width = 32 if trial is None else trial.suggest_categorical("width", [16, 32, 64])
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
    )
    return BertForSequenceClassification(config)


def search_space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the arguments of the Trainer that are tuned."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model_init=model_init,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=6,
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Sentences(64),
            eval_dataset=Sentences(32),
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
