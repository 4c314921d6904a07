"""How long an admission takes, with few and with many finished trials in the study.

An admission is what `QuotaSampler` adds before a trial: write the grant, read what has changed,
and decide whether it holds; from the middle of a quota on, with a claim before the grant. It is
compared, in the same run and storage, with one bare `study.ask()` with a random sampler, and with
an admission that reads all rows again and sums them, without a cursor.

    python benchmarks/admission_latency.py --storages sqlite postgresql --trials 100 1000 10000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import datetime
import json
import statistics
import time
import warnings

from common import storages
import optuna
from optuna.trial import create_trial, TrialState

from optuna_quota import Limits, Quota, Usage
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._optuna import storage_of, study_id_of, trial_id_of
from optuna_quota._records import read_record
from tests.storages import KINDS, study_in


QUOTA = Quota(n_trials=10**9, cpu_time=1e12, wall_time="10000d", memory="1024GiB")
FOOTPRINT = {"cpu_time": 10.0, "memory": 2.0**30}


def main() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storages", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--trials", nargs="+", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--admissions", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="100 and 1,000 trials, in files")
    options = parser.parse_args()
    if options.quick:
        options.storages, options.trials = ["memory", "sqlite", "journal-file"], [100, 1_000]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("milliseconds; medians, but for the fastest and for the first admission of a process")
    heads = "     ask  admission fastest     CPU     first  no cursor"
    print(f"{'storage':14} {'finished':>8} {heads}")
    for address in storages(options.storages):
        for count in options.trials:
            with study_in(address, sampler=optuna.samplers.RandomSampler()) as study:
                fill(study, address.kind, count)
                report(address.kind, count, study, options.admissions)


def fill(study: optuna.Study, kind: str, count: int) -> None:
    """Add finished trials; in bulk where one at a time takes minutes."""
    attributes = {"quota:cpu_time": 9.5, "quota:wall_time": 10, "quota:outcome": "completed"}
    if kind not in ("sqlite", "postgresql", "mysql"):
        study.add_trials([create_trial(value=0.0, user_attrs=attributes)] * count)
        return
    import sqlalchemy

    engine = storage_of(study)._backend.engine  # type: ignore[attr-defined]
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    now, study_id = datetime.datetime.now(), study_id_of(study)
    with engine.begin() as connection:
        rows = [
            {
                "study_id": study_id,
                "number": number,
                "state": "COMPLETE",
                "datetime_start": now,
                "datetime_complete": now,
            }
            for number in range(count)
        ]
        trials, texts = tables.tables["trials"], tables.tables["trial_user_attributes"]
        connection.execute(trials.insert(), rows)
        chosen = sqlalchemy.select(trials.c.trial_id).where(trials.c.study_id == study_id)
        ids = [row[0] for row in connection.execute(chosen)]
        values = [
            {"trial_id": i, "objective": 0, "value": 0.0, "value_type": "FINITE"} for i in ids
        ]
        connection.execute(tables.tables["trial_values"].insert(), values)
        pairs = [
            {"trial_id": i, "key": key, "value_json": json.dumps(value)}
            for i in ids
            for key, value in attributes.items()
        ]
        connection.execute(texts.insert(), pairs)


def report(kind: str, count: int, study: optuna.Study, admissions: int) -> None:
    ledger = Ledger(study, QUOTA)
    asks: list[float] = []
    admits: list[float] = []
    processor: list[float] = []
    for _ in range(admissions + 1):
        began = time.perf_counter()
        trial = study.ask()
        asks.append(time.perf_counter() - began)
        row = storage_of(study).get_trial(trial_id_of(trial))
        began, busy = time.perf_counter(), time.process_time()
        ledger.reserve(row, limits=Limits(), footprint=FOOTPRINT)
        admits.append(time.perf_counter() - began)
        processor.append(time.process_time() - busy)
        ledger.charge(trial_id_of(trial), Usage(cpu_time=9.0))
        study.tell(trial, state=TrialState.FAIL)
    # The first one of a process reads all rows once; reading all again shows what that costs.
    naive = [timed(lambda: sum_all(study)) for _ in range(3)]
    figures = [asks[1:], admits[1:], processor[1:], admits[:1], naive]
    ask, admit, busy, first, slow = (statistics.median(f) * 1e3 for f in figures)
    cells = f"{ask:>8.1f} {admit:>10.1f} {min(admits) * 1e3:>7.1f} {busy:>7.1f}"
    print(f"{kind:14} {count:>8,} {cells} {first:>9.1f} {slow:>10.1f}", flush=True)


def sum_all(study: optuna.Study) -> float:
    trials = study.get_trials(deepcopy=True)
    return sum(read_record(trial).usage.cpu_time or 0.0 for trial in trials)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
