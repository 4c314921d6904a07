"""Lightning with its pruning callback inside an isolated trial."""

from __future__ import annotations

import logging
import warnings

import lightning
import optuna
from optuna_integration import PyTorchLightningPruningCallback
import torch
from torch.utils.data import DataLoader, TensorDataset

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


class Regression(lightning.LightningModule):
    """A small network that logs its validation loss."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 1)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def objective(trial: optuna.Trial) -> float:
    """Return the validation loss after three epochs."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PyTorchLightningPruningCallback(trial, monitor="val_loss")],
    )
    width = trial.suggest_int("width", 8, 512, log=True)
    model = Regression(width, trial.suggest_float("rate", 1e-4, 1e-1, log=True))
    trainer.fit(model, loader, loader)
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
