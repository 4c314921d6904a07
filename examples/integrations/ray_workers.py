"""Ray tasks and actors as workers of one study: isolated trials, limits, and one quota for all.

Ray places the workers; each trial runs in a process of its own, measured and killed as anywhere.
On several hosts, the storage is a database that all of them reach.
"""

from __future__ import annotations

import os
import tempfile

import optuna
import ray

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the square of x, with x · 50 MiB of memory."""
    x = trial.suggest_float("x", 0, 2)
    data = bytes(range(256)) * int(x * 50 * 4096)
    return x**2 + len(data) * 0


def work(storage: str) -> None:
    """Run trials until the quota is used up."""
    study = optuna.load_study(
        study_name="ray",
        storage=storage,
        sampler=QuotaSampler(optuna.samplers.TPESampler(), quota=Quota(n_trials=6)),
        pruner=QuotaPruner(limits=Limits(memory="512MiB", wall_time="1min")),
    )
    study.optimize(isolated(objective))


class Worker:
    """A worker that stays, and could keep a dataset between its studies."""

    def run(self, storage: str) -> None:
        """Run trials until the quota is used up."""
        work(storage)


if __name__ == "__main__":
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/ray.db"
        study = optuna.create_study(study_name="ray", storage=storage)
        actor = ray.remote(Worker).remote()
        ray.get([ray.remote(work).remote(storage), actor.run.remote(storage)])
        ray.shutdown()
        table = trial_table(study)
    print(table[["number", "value", "memory", "cpu_time", "outcome"]])
    print(f"{(table['outcome'] == 'completed').sum()} completed")
    print(f"isolated: {set(table['isolation'].dropna())}")
