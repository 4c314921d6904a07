"""A Hydra application as it is, with a line that prints its value; see ``hydra_script.py``."""

from __future__ import annotations

import json

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig


ConfigStore.instance().store("train", {"model": {"width": 8}, "rate": 0.1})


@hydra.main(version_base=None, config_name="train")
def main(config: DictConfig) -> None:
    """Print the value of a configuration."""
    loss = (config.rate - 0.01) ** 2 + 1 / config.model.width
    print(json.dumps({"value": loss}))


if __name__ == "__main__":
    main()
