"""Ray Tune's OptunaSearch: it takes a sampler and no pruner, so the limits go to the sampler.

Ray trains in processes of its own, which the study's process does not see: their memory and CPU
time are not measured, and stopping a trial is left to Ray. The totals that the study's process
can count hold: the number of trials, and the time of trials.
"""

from __future__ import annotations

import os
import tempfile

import optuna
import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from optuna_quota import Quota
from optuna_quota import QuotaSampler


def train(config: dict[str, float]) -> None:
    """Report one value."""
    tune.report({"loss": (config["x"] - 2) ** 2})


if __name__ == "__main__":
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20
    )
    search = OptunaSearch(
        metric="loss",
        mode="min",
        sampler=QuotaSampler(optuna.samplers.TPESampler(seed=0), quota=Quota(trial_time="2min")),
    )
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            train,
            param_space={"x": tune.uniform(-5, 5)},
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(search, max_concurrent=2), num_samples=4
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    ray.shutdown()
    print(f"{len(results)} trials, {results.num_errors} errors")
    print(f"best loss {results.get_best_result('loss', 'min').metrics['loss']:.3f}")
