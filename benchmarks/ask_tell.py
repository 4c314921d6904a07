"""What QuotaSampler adds to the time of a trial, compared to the bare sampler.

    python benchmarks/ask_tell.py [--quick]

Two studies grow to 10, 100, 1,000 and, without --quick, 10,000 finished trials, one with the bare
sampler, one with QuotaSampler and the rows that it writes. At each size, trials of both are asked
and told in turn. "added" is the difference of the medians: admission, metering and recording. For
comparison, "TPE ask" is what TPE takes to suggest two parameters at that size, in memory. CPU is
that of the calling thread: on a busy machine it is more precise than the clock, which on a disk
mostly counts commits (a bare trial of two parameters makes four). The footprint is fitted again
after some trials only; the mean of the added CPU includes these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
import statistics
import sys
import tempfile
import time
import warnings

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import create_trial, FrozenTrial


sys.path.insert(0, str(Path(__file__).parents[1]))

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler


SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
QUOTA = Quota(n_trials=10**6, cpu_time="1000h", wall_time="1000h")
LIMITS = Limits(memory="1TiB", wall_time="10h")


def storages(folder: Path) -> dict[str, Callable[[str], BaseStorage]]:
    return {
        "memory": lambda name: InMemoryStorage(),
        "sqlite": lambda name: RDBStorage(f"sqlite:///{folder}/{name}.db"),
        "journal": lambda name: JournalStorage(JournalFileBackend(f"{folder}/{name}.log")),
    }


def finished(number: int, *, quota: bool) -> FrozenTrial:
    """Return a row as either sampler leaves it."""
    x, y = (number * 0.61803) % 1, (number * 0.41421) % 1
    attributes = {
        "quota:memory": 10**8,
        "quota:wall_time": 0.01,
        "quota:cpu_time": 0.01,
        "quota:outcome": "completed",
        "quota:isolation": "thread",
        "quota:host": "host",
    }
    return create_trial(
        params={"x": x, "y": y},
        distributions=SPACE,
        value=(x - 0.3) ** 2 + y,
        user_attrs=attributes if quota else {},
    )


def grow(study: optuna.Study, size: int, *, quota: bool) -> None:
    for number in range(len(study.get_trials(deepcopy=False)), size):
        study.add_trial(finished(number, quota=quota))


Times = list[tuple[float, float]]


def one_trial(study: optuna.Study) -> tuple[float, float]:
    """Return the milliseconds on the clock and of CPU of a trial with two parameters."""
    start, cpu = time.perf_counter(), time.thread_time()
    trial = study.ask()
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    study.tell(trial, (x - 0.3) ** 2 + y)
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - cpu)


def side_by_side(bare: optuna.Study, wrapped: optuna.Study, repeats: int) -> tuple[Times, Times]:
    """Return :func:`one_trial` in each, taken in turn."""
    taken: tuple[Times, Times] = ([], [])
    for _ in range(repeats + 3):
        taken[0].append(one_trial(bare))
        taken[1].append(one_trial(wrapped))
    return taken[0][3:], taken[1][3:]


def medians(pairs: Times) -> tuple[float, float]:
    clock, cpu = zip(*pairs, strict=True)
    return statistics.median(clock), statistics.median(cpu)


def tpe_ask(size: int, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds that TPE needs to suggest two parameters."""
    study = optuna.create_study(sampler=TPESampler(seed=0))
    grow(study, size, quota=False)
    pairs = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.thread_time()
        study.ask(SPACE)
        pairs.append((1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - cpu)))
    return medians(pairs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 1,000 trials, fewer repeats")
    quick = parser.parse_args().quick
    sizes = [10, 100, 1000] if quick else [10, 100, 1000, 10_000]
    repeats = 20 if quick else 60
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    asks = {size: tpe_ask(size, 8) for size in sizes}
    columns = ("bare", "quota", "added", "TPE ask", "ratio")
    heads = [f"{head:>9}" for head in columns] + [f"{'CPU ' + head:>12}" for head in columns]
    heads.append(f"{'CPU mean':>9}")
    print(f"{'storage':8} {'trials':>6} {' '.join(heads)}   (ms, medians; mean of CPU added)")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in storages(Path(folder)).items():
            sampler: BaseSampler = QuotaSampler(RandomSampler(seed=0), quota=QUOTA)
            bare = optuna.create_study(storage=make("bare"), sampler=RandomSampler(seed=0))
            wrapped = optuna.create_study(
                storage=make("quota"), sampler=sampler, pruner=QuotaPruner(limits=LIMITS)
            )
            for size in sizes:
                grow(bare, size, quota=False)
                grow(wrapped, size, quota=True)
                plain, quota = side_by_side(bare, wrapped, repeats)
                mean = sum(q[1] - p[1] for p, q in zip(plain, quota, strict=True)) / repeats
                cells = row(medians(plain), medians(quota), asks[size])
                print(f"{name:8} {size:6} {cells} {mean:9.3f}", flush=True)


def row(plain: tuple[float, float], quota: tuple[float, float], ask: tuple[float, float]) -> str:
    cells = []
    for width, before, after, tpe in zip((9, 12), plain, quota, ask, strict=True):
        added = after - before
        cells += [f"{value:{width}.3f}" for value in (before, after, added, tpe)]
        cells.append(f"{added / tpe:{width}.1%}")
    return " ".join(cells)


if __name__ == "__main__":
    main()
