"""A Lightning training script on two ranks (DDP, on the CPU); see ``lightning_script.py``.

Lightning runs the script once more for rank 1. Only rank 0 prints, as lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any
import warnings

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class JsonLines(lightning.Callback):
    """Prints the validation loss of each epoch, and the last one at the end."""

    def on_validation_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.print(trainer, step=trainer.current_epoch)

    def on_fit_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        self.print(trainer, ranks=trainer.world_size)

    def print(self, trainer: lightning.Trainer, **more: Any) -> None:
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["val_loss"])
            print(json.dumps({"value": loss, **more}), flush=True)


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
        loss = torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.01)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[JsonLines()],
    )
    trainer.fit(Regression(arguments.width, arguments.rate), loader, loader)
