"""Worker processes that share nothing but a storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import multiprocessing
from multiprocessing.process import BaseProcess
import random
import time
from typing import Any

import optuna
from optuna.trial import TrialState

from optuna_quota import Limits, Quota, Usage
from optuna_quota._ledger.grant import Refusal
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import TrialRecord, write_record
from tests.storages import Address


def load(address: Address, name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler()
    return optuna.load_study(study_name=name, storage=address.open(), sampler=sampler)


def go_through(
    address: Address,
    name: str,
    quota: Quota,
    footprint: dict[str, float],
    seconds: float,
) -> None:
    """Run trials that use at most their footprint, until nothing more is admitted."""
    study = load(address, name)
    ledger = Ledger(study, quota)
    while True:
        trial = study.ask()
        trial_id = trial_id_of(trial)
        row = storage_of(study).get_trial(trial_id)
        answer = ledger.reserve(row, limits=Limits(), footprint=footprint)
        if isinstance(answer, Refusal):
            record = TrialRecord(outcome="rejected", reason=answer.reason)
            write_record(storage_of(study), trial_id, record)
            study.tell(trial, state=TrialState.FAIL)
            assert answer.final, answer
            return
        time.sleep(seconds * random.random())
        usage = Usage(cpu_time=footprint.get("cpu_time"), wall_time=seconds)
        write_record(storage_of(study), trial_id, TrialRecord(usage, "completed"))
        ledger.charge(trial_id, usage)
        study.tell(trial, 0.0)


def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ledger_tests.workers"])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@contextmanager
def working(
    count: int, target: Callable[..., Any], *arguments: Any
) -> Iterator[list[BaseProcess]]:
    """Run processes, and end them with the block."""
    processes = [start(target, *arguments) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(processes: list[BaseProcess], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode == 0, f"a worker ended with {process.exitcode}"
