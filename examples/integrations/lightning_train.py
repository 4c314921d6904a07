"""A Lightning training script on two ranks (DDP, on the CPU); see ``lightning_script.py``.

Lightning runs the script once more for rank 1. Only rank 0 prints, as lines of JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import lightning
from lightning_model import train


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.01)
    arguments = parser.parse_args()
    train(
        arguments.width,
        arguments.rate,
        max_epochs=2,
        devices=2,
        strategy="ddp",
        callbacks=[JsonLines()],
    )
