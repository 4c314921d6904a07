"""How many short trials a second many workers run: isolated, in process, and bare Optuna.

Workers are processes that share a study and nothing else. Each trial draws two parameters and
sleeps; rounds of the three ways follow each other in one run, so that they meet the same machine.

    python benchmarks/throughput.py --storage postgresql --workers 12 --seconds 0.25
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from multiprocessing.synchronize import Barrier
import statistics
import time
import warnings

from common import run_workers, storages
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler
from tests.storages import Address, SHARED, study_in


WAYS = ("bare", "in process", "isolated")
SAMPLERS = {"tpe": TPESampler, "random": RandomSampler}


class Objective:
    """Draws a point and sleeps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        time.sleep(self.seconds)
        return x + y


def work(
    address: Address,
    name: str,
    way: str,
    sampler: str,
    seconds: float,
    lasts: float,
    start: Barrier,
) -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base: BaseSampler = SAMPLERS[sampler]()
    study = optuna.load_study(study_name=name, storage=address.open(), sampler=base)
    objective = Objective(seconds)
    if way != "bare":
        quota = Quota(n_trials=10**6, cpu_time="100h", wall_time="100h")
        study.sampler = QuotaSampler(base, quota=quota)
        study.pruner = QuotaPruner(limits=Limits(memory="4GiB", wall_time="5min"))
    run = isolated(objective) if way == "isolated" else objective
    # Connections, imports and the fork server are not what is measured.
    study.optimize(run, n_trials=1)
    start.wait()
    study.optimize(run, timeout=lasts)


def measure(address: Address, way: str, options: argparse.Namespace) -> float:
    """Return the trials finished in each second."""
    with study_in(address) as study:

        def trials() -> list[optuna.trial.FrozenTrial]:
            return study.get_trials(deepcopy=False)

        order = (options.sampler, options.seconds, options.lasts)
        arguments = (address, study.study_name, way, *order)
        timeout = options.lasts + 120
        before = run_workers(work, arguments, options.workers, timeout, lambda: len(trials()))
        ran = trials()[before:]
        begins = [t.datetime_start for t in ran if t.datetime_start is not None]
        ends = [t.datetime_complete for t in ran if t.datetime_complete is not None]
        return len(ends) / (max(ends) - min(begins)).total_seconds()


def main() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", choices=SHARED, default="postgresql")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="tpe")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one trial")
    parser.add_argument("--lasts", type=float, default=15.0, help="seconds of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 8 s each")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.lasts = 1, 8.0
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The models load scipy, once a worker.
    modules = ["optuna", "optuna_quota", "scipy.optimize", "scipy.stats"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    print(
        f"{options.workers} workers on {options.storage}, {options.sampler}, trials of "
        f"{options.seconds:g} s: trials a second"
    )
    rates: dict[str, list[float]] = {way: [] for way in options.ways}
    for _, way in itertools.product(range(options.rounds), options.ways):
        for address in storages([options.storage]):
            rates[way].append(measure(address, way, options))
    if not any(rates.values()):
        # The reason was printed.
        return
    bare = statistics.median(rates.get("bare", [float("nan")]))
    for way, found in rates.items():
        each = " ".join(f"{rate:.1f}" for rate in found)
        median = statistics.median(found)
        print(f"{way:12} {median:6.1f}  {median / bare:4.0%} of bare  ({each})")


if __name__ == "__main__":
    main()
