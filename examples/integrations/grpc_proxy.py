"""Optuna's gRPC storage proxy: many workers reach one database through a server."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
import socket
import tempfile

import optuna

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, trial_table


def serve(url: str, port: int) -> None:
    """Serve a storage until killed."""
    storage = optuna.storages.RDBStorage(url)
    optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=port)


def work(port: int) -> None:
    """Take part in the study as one of its workers."""
    storage = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port)
    storage.wait_server_ready(timeout=30)
    study = optuna.create_study(
        study_name="shared",
        storage=storage,
        load_if_exists=True,
        sampler=QuotaSampler(quota=Quota(n_trials=10)),
        pruner=QuotaPruner(limits=Limits(memory="2GiB")),
    )
    study.optimize(lambda trial: trial.suggest_float("x", -10, 10) ** 2, n_trials=10)


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'shared.db'}"
        server = context.Process(target=serve, args=(url, free_port), daemon=True)
        server.start()
        workers = [context.Process(target=work, args=(free_port,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        server.kill()
        server.join()
        table = trial_table(optuna.load_study(study_name="shared", storage=url))
    print(table[["number", "value", "memory", "cpu_time", "outcome"]])
    print(f"{(table['outcome'] == 'completed').sum()} completed")
