"""By how much many workers overshoot a total quota: the ledger beside two simpler ways.

Each worker is a process that runs trials until its way of counting says that the quota is used
up. Every trial uses exactly one unit, so all beyond the quota was admitted wrongly.

* ledger: each trial reserves on its own row, reads all, and admits or gives way.
* attribute: read the amount used from a study attribute, add one unit, write it back.
* sum: add up what finished trials used, and run when one more unit fits.

    python benchmarks/ledger_overshoot.py --storages sqlite postgresql --workers 1 8 32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import multiprocessing
from multiprocessing.synchronize import Barrier
import random
import time
import warnings

from common import run_workers, storages
import optuna
from optuna.trial import TrialState

from optuna_quota import Limits, Quota, Usage
from optuna_quota._ledger.heartbeat import RunningTrial
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._optuna import storage_of, trial_id_of
from optuna_quota._records import read_record, TrialRecord, write_record
from tests.storages import Address, SHARED, study_in


# Seconds of one trial, at most.
TRIAL = 0.02
Admits = Callable[[optuna.Study, optuna.trial.Trial], bool]


def by_ledger(study: optuna.Study, units: int) -> Admits:
    """Admit by the library's ledger."""
    ledger = Ledger(study, Quota(cpu_time=units))

    def admits(study: optuna.Study, trial: optuna.trial.Trial) -> bool:
        row = storage_of(study).get_trial(trial_id_of(trial))
        answer = ledger.reserve(row, limits=Limits(), footprint={"cpu_time": 1.0})
        return isinstance(answer, RunningTrial)

    return admits


def by_attribute(study: optuna.Study, units: int) -> Admits:
    """Admit by a sum that is kept in a study attribute."""

    def admits(study: optuna.Study, trial: optuna.trial.Trial) -> bool:
        used = study.user_attrs.get("used", 0)
        if used + 1 > units:
            return False
        study.set_user_attr("used", used + 1)
        return True

    return admits


def by_sum(study: optuna.Study, units: int) -> Admits:
    """Admit by a sum over finished trials."""

    def admits(study: optuna.Study, trial: optuna.trial.Trial) -> bool:
        return used_by(study) + 1 <= units

    return admits


WAYS = {"ledger": by_ledger, "attribute": by_attribute, "sum": by_sum}


def used_by(study: optuna.Study) -> float:
    rows = study.get_trials(deepcopy=False)
    return sum(read_record(row).usage.cpu_time or 0.0 for row in rows if row.state.is_finished())


def work(address: Address, name: str, way: str, units: int, together: Barrier) -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    sampler = optuna.samplers.RandomSampler()
    study = optuna.load_study(study_name=name, storage=address.open(), sampler=sampler)
    admits = WAYS[way](study, units)
    together.wait()
    while True:
        trial = study.ask()
        if not admits(study, trial):
            record = TrialRecord(outcome="rejected", reason="The quota is used up.")
            write_record(storage_of(study), trial_id_of(trial), record)
            study.tell(trial, state=TrialState.FAIL)
            return
        time.sleep(TRIAL * random.random())
        record = TrialRecord(Usage(cpu_time=1.0, wall_time=TRIAL), "completed")
        write_record(storage_of(study), trial_id_of(trial), record)
        study.tell(trial, 0.0)


def measure(address: Address, way: str, workers: int, units: int) -> tuple[float, float]:
    """Return what was used in all, and the seconds until the last worker ended."""
    with study_in(address) as study:
        arguments = (address, study.study_name, way, units)
        began = run_workers(work, arguments, workers, 300, time.perf_counter)
        return used_by(study), time.perf_counter() - began


def main() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storages", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--units", type=int, default=48, help="the quota, in units of one trial")
    parser.add_argument("--quick", action="store_true", help="1 and 8 workers, in files")
    options = parser.parse_args()
    if options.quick:
        options.storages, options.workers, options.units = ["journal-file", "sqlite"], [1, 8], 24
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["optuna", "optuna_quota"])
    print(f"A quota of {options.units} units, one a trial: overshoot, and seconds in all")
    print(f"{'storage':14} {'workers':>7} " + "".join(f"{way:>20}" for way in WAYS))
    for address in storages(options.storages):
        for workers in options.workers:
            cells = []
            for way in WAYS:
                used, seconds = measure(address, way, workers, options.units)
                over = 100 * (used - options.units) / options.units
                cells.append(f"{f'{over:+.0f}%':>12}{seconds:>6.1f} s")
            print(f"{address.kind:14} {workers:>7} " + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
