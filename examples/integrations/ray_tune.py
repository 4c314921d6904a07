"""Ray Tune's OptunaSearch, with a quota: the search ends with it.

Ray trains in processes of its own, which the study's process does not see: with
``metering=False`` only the time of each trial is recorded, and a quota can be on the number of
trials and on their time. OptunaSearch takes a sampler and no pruner; stopping a trial is left to
Ray. Without a ``ConcurrencyLimiter``, Ray asks for trials long before it runs them.
"""

from __future__ import annotations

import os
import tempfile

import optuna
import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from optuna_quota import Quota, QuotaSampler, trial_table, Usage


def train(config: dict[str, float]) -> None:
    """Report one value."""
    tune.report({"loss": (config["x"] - 2) ** 2})


if __name__ == "__main__":
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20
    )
    storage = optuna.storages.InMemoryStorage()
    search = OptunaSearch(
        metric="loss",
        mode="min",
        sampler=QuotaSampler(
            optuna.samplers.TPESampler(seed=0),
            quota=Quota(n_trials=4, trial_time="20min"),
            footprint=lambda params: Usage(wall_time=1 + abs(params["x"])),
            metering=False,
        ),
        storage=storage,
        study_name="ray",
    )
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            train,
            param_space={"x": tune.uniform(-5, 5)},
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(search, max_concurrent=2),
                num_samples=10,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    ray.shutdown()
    print(f"{len(results)} trials, {results.num_errors} errors")
    print(f"best loss {results.get_best_result('loss', 'min').metrics['loss']:.3f}")
    table = trial_table(optuna.load_study(storage=storage, study_name="ray"))
    print(table[["number", "value", "memory", "wall_time", "outcome"]].to_string(index=False))
