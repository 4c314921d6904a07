"""Dask: a study in DaskStorage, isolated trials on its workers, and one quota for all of them."""

from __future__ import annotations

from distributed import Client, LocalCluster, wait
import optuna
from optuna_integration import DaskStorage

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def objective(trial: optuna.Trial) -> float:
    """Return the square of x."""
    return trial.suggest_float("x", -10, 10) ** 2


if __name__ == "__main__":
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        study = optuna.create_study(
            storage=DaskStorage(client=client),
            sampler=QuotaSampler(optuna.samplers.TPESampler(), quota=Quota(n_trials=6)),
            pruner=QuotaPruner(limits=Limits(memory="2GiB", wall_time="30s")),
        )
        futures = [
            client.submit(study.optimize, isolated(objective), n_trials=5, pure=False)
            for _ in range(2)
        ]
        wait(futures)
        for future in futures:
            future.result()
        table = trial_table(study)
        print(table[["number", "value", "memory", "cpu_time", "outcome"]])
        print(f"{(table['outcome'] == 'completed').sum()} completed")
        print(f"isolated: {set(table['isolation'].dropna())}")
