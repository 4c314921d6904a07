"""Hydra: sampler, quota, pruner and limits written in a configuration by ``_target_``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf
import optuna

from optuna_quota import trial_table


CONFIG = OmegaConf.create(
    """
    study:
      _target_: optuna.create_study
      sampler:
        _target_: optuna_quota.QuotaSampler
        base_sampler: {_target_: optuna.samplers.TPESampler, seed: 0}
        quota: {_target_: optuna_quota.Quota, n_trials: 5, cpu_time: 10min}
      pruner:
        _target_: optuna_quota.QuotaPruner
        limits: {_target_: optuna_quota.Limits, memory: 2GiB, wall_time: 30s}
    """
)


def run(config: DictConfig) -> optuna.Study:
    """Return the study of a configuration after it has run."""
    study: optuna.Study = hydra.utils.instantiate(config.study)
    study.optimize(lambda trial: trial.suggest_float("x", -10, 10) ** 2, n_trials=20)
    return study


if __name__ == "__main__":
    print(trial_table(run(CONFIG))[["number", "value", "memory", "cpu_time", "outcome"]])
