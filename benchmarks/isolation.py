"""Isolated trials: overshoot past a memory limit, breach to dead, start cost, round trip, pools.

**Overshoot.** A trial allocates as fast as the memory allows until it is stopped: private memory
in blocks (``numpy.ones``) and as one large array, shared memory, and shared memory by a trial that
catches every exception and continues. Alone, and beside two busy processes. This library is
compared with pynisher, and psutil pollers of 100 and 250 ms that kill the process. The peak is
what the trial itself last saw of its anonymous and shared memory (less what it shares with its
parent, as smaps_rollup has it at the start), written to a file that it shares with the benchmark;
the time runs from the moment when the limit was passed, or an allocation was refused, to the
moment when the caller has control back and the process is gone. pynisher limits address space and
pollers look at resident memory, so they may stop a trial below the limit: that is an overshoot of
0.

**Start.** A call that does nothing, beside multiprocessing's and pynisher's by the same method.

**Round trip.** ``report`` and ``should_prune`` in the trial, beside the same in process.

**Pools.** ``--pools 2000`` runs that many trials that map over a ``multiprocessing.Pool(2)`` and
leave it by ``with``, which terminates it, beside the same in multiprocessing's own children. One
that takes 30 s hangs. It runs nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import contextlib
import mmap
import multiprocessing
from pathlib import Path
import statistics
import struct
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
import optuna
import psutil
from verdicts import busy_processes

from optuna_quota import isolated, Limits


MIB = 2**20
LIMIT = 512 * MIB
# A poller that is too slow must not exhaust the machine's memory.
CEILING = 2048 * MIB
BLOCK = MIB
RECORD = "ddd"
KINDS = ("private", "one array", "shared", "shared, stubborn")
HANG = 30.0
# Not "__main__", which Python 3.11's forkserver silently skips.
PRELOAD = ["numpy", "psutil", "optuna", "optuna_quota._isolation.isolated", "verdicts"]


class Progress:
    """What the trial writes and the benchmark reads: peak, time of passing, last time."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), struct.calcsize(RECORD))

    def write(self, peak: float, passed: float, last: float) -> None:
        struct.pack_into(RECORD, self._map, 0, peak, passed, last)

    def read(self) -> tuple[float, float, float]:
        return struct.unpack_from(RECORD, self._map, 0)


class Memory:
    """The anonymous and shared memory of this process, less what its parent shares with it."""

    def __init__(self) -> None:
        held = _kilobytes("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))
        self._inherited = 0
        self._inherited = self() - held

    def __call__(self) -> int:
        return _kilobytes("status", ("RssAnon:", "RssShmem:")) - self._inherited


def _kilobytes(name: str, heads: tuple[str, ...]) -> int:
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(heads))


def allocate(path: str, kind: str) -> None:
    """Allocate until stopped."""
    watch = TrialMonitor(path)
    if kind == "one array":
        threading.Thread(target=watch.go_on, daemon=True).start()
        try:
            np.ones(CEILING - 2 * LIMIT, dtype=np.uint8)
        except MemoryError:
            watch.refused()
            raise
        time.sleep(10)  # one that was not stopped while it was filled
        return
    held: list[Any] = []
    deadline = time.monotonic() + 10
    while len(held) * BLOCK < CEILING and time.monotonic() < deadline:
        try:
            held.append(_block(kind))
        except MemoryError:
            watch.refused()
            raise
        except BaseException:
            if kind != "shared, stubborn":
                raise
        watch.look()


class TrialMonitor:
    """Writes how far the memory of this process has come."""

    def __init__(self, path: str) -> None:
        self._progress = Progress(path)
        self._memory = Memory()
        self._peak, self._passed = 0.0, 0.0

    def look(self) -> None:
        self._peak = max(self._peak, self._memory())
        if self._peak > LIMIT and not self._passed:
            self._passed = time.monotonic()
        self._progress.write(self._peak, self._passed, time.monotonic())

    def refused(self) -> None:
        self._progress.write(self._peak, self._passed or time.monotonic(), time.monotonic())

    def go_on(self) -> None:
        while True:
            self.look()
            time.sleep(0.0003)


def _block(kind: str) -> Any:
    if kind == "private":
        return np.ones(BLOCK, dtype=np.uint8)
    shared = mmap.mmap(-1, BLOCK)
    np.frombuffer(shared, dtype=np.uint8)[:] = 1
    return shared


def by_isolated(path: str, kind: str) -> None:
    study = optuna.create_study()
    objective = isolated(lambda trial: allocate(path, kind), limits=Limits(memory=LIMIT))
    study.optimize(objective, n_trials=1)


def by_pynisher(path: str, kind: str) -> None:
    from pynisher import limit, PynisherException

    limited = limit(allocate, memory=LIMIT, context="forkserver")
    with contextlib.suppress(PynisherException, MemoryError, OSError):
        limited(path, kind)


def by_poller(period: float) -> Callable[[str, str], None]:
    def run(path: str, kind: str) -> None:
        process = multiprocessing.get_context("fork").Process(target=allocate, args=(path, kind))
        process.start()
        watched = psutil.Process(process.pid)
        while process.is_alive():
            with contextlib.suppress(psutil.Error):
                if watched.memory_info().rss > LIMIT:
                    process.kill()
                    break
            time.sleep(period)
        process.join()

    return run


def measure_overshoot(repeats: int, beside: str) -> None:
    print(f"Overshoot past {LIMIT / MIB:.0f} MiB, and time from there to control back, {beside}\n")
    print(f"{'memory':<18}{'by':<16}{'overshoot MiB':>26}{'to dead ms':>24}")
    print(f"{'':<34}{'median':>14}{'worst':>12}{'median':>12}{'worst':>12}")
    methods: dict[str, Callable[[str, str], None]] = {
        "optuna_quota": by_isolated,
        "pynisher": by_pynisher,
        "psutil 100 ms": by_poller(0.1),
        "psutil 250 ms": by_poller(0.25),
    }
    for kind in KINDS:
        for name, method in methods.items():
            if name == "pynisher" and not has_pynisher():
                print(f"{kind:<18}{name:<16}  (not installed)")
                continue
            found = [_overshoot(method, kind) for _ in range(repeats)]
            over = [o / MIB for o, _ in found]
            dead = [d * 1e3 for _, d in found]
            print(
                f"{kind:<18}{name:<16}{statistics.median(over):>14.1f}{max(over):>12.1f}"
                f"{statistics.median(dead):>12.1f}{max(dead):>12.1f}"
            )
    print()


def _overshoot(method: Callable[[str, str], None], kind: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "progress"))
        Path(path).write_bytes(bytes(struct.calcsize(RECORD)))
        method(path, kind)
        back = time.monotonic()
        peak, passed, last = Progress(path).read()
    return max(0.0, peak - LIMIT), back - (passed or last)


def has_pynisher() -> bool:
    try:
        import pynisher  # noqa: F401
    except ImportError:
        return False
    return True


def nothing() -> float:
    return 0.0


def nothing_of_a_trial(trial: optuna.Trial) -> float:
    return 0.0


def _send(connection: Any, function: Callable[[], float]) -> None:
    connection.send(function())


def by_multiprocessing(method: str, function: Callable[[], float]) -> Callable[[], float | None]:
    """Return a call of a function in a child, which gives None if it hangs."""
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)

    def call() -> float | None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_send, args=(theirs, function))
        process.start()
        value: float | None = ours.recv() if ours.poll(HANG) else None
        process.join(0 if value is None else HANG)
        process.kill()
        process.join()
        ours.close()
        theirs.close()
        return value

    return call


def measure_start(repeats: int) -> None:
    print("A call that does nothing, ms a call\n")
    print(f"{'by':<28}{'median':>10}{'fastest':>10}{'x in process':>15}")
    study = optuna.create_study()
    baseline = _time(_trial(study, nothing_of_a_trial), repeats)
    _print_start("in process", baseline, baseline)
    for method in ("forkserver", "fork", "spawn"):
        count = repeats if method != "spawn" else max(3, repeats // 10)
        objective = isolated(nothing_of_a_trial, start_method=method)  # type: ignore[arg-type]
        _print_start(f"optuna_quota {method}", _time(_trial(study, objective), count), baseline)
        call = by_multiprocessing(method, nothing)
        _print_start(f"multiprocessing {method}", _time(call, count), baseline)
        if has_pynisher():
            from pynisher import limit

            limited = limit(nothing, memory=2**34, context=method)
            _print_start(f"pynisher {method}", _time(limited, count), baseline)
    print()


def _trial(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> Callable[[], Any]:
    return lambda: study.optimize(objective, n_trials=1)


def _time(call: Callable[[], Any], repeats: int) -> list[float]:
    call()
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
        # What a trial does beside this is not waited for by the next one.
        time.sleep(0.02)
    return times


def _print_start(name: str, times: list[float], baseline: list[float]) -> None:
    median = statistics.median(times)
    ratio = median / statistics.median(baseline)
    print(f"{name:<28}{median:>10.2f}{min(times):>10.2f}{ratio:>15.1f}")


def measure_round_trip(steps: int) -> None:
    print("report and should_prune, µs a pair\n")
    print(f"{'storage':<12}{'in process':>12}{'isolated':>12}{'more':>10}")

    def objective(trial: optuna.Trial) -> float:
        times = []
        for step in range(steps):
            start = time.perf_counter()
            trial.report(1.0, step)
            trial.should_prune()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    with tempfile.TemporaryDirectory() as folder:
        for name, storage in (("memory", None), ("sqlite", f"sqlite:///{folder}/study.db")):
            pruner = optuna.pruners.MedianPruner()
            study = optuna.create_study(storage=storage, pruner=pruner)
            study.optimize(objective, n_trials=3)
            here = min(t.value or 0.0 for t in study.trials)
            study.optimize(isolated(objective), n_trials=3)
            there = min(t.value or 0.0 for t in study.trials[3:])
            print(f"{name:<12}{here:>12.1f}{there:>12.1f}{there - here:>10.1f}")
    print()


def map_over_pool(*_: Any) -> float:
    # As the context has it: multiprocessing's children by forkserver start theirs so as well.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return float(sum(pool.map(abs, range(8))))


def measure_pools(count: int) -> None:
    print("Trials with a Pool(2) in each\n")
    print(f"{'by':<28}{'trials':>8}{'right':>8}{'hung':>8}{'median ms':>12}")
    for method in ("forkserver", "fork", "spawn"):
        n = count if method != "spawn" else max(1, count // 10)
        _print_pools(f"optuna_quota {method}", n, pools_by_isolated(method))
        _print_pools(f"multiprocessing {method}", n, by_multiprocessing(method, map_over_pool))


def pools_by_isolated(method: str) -> Callable[[], float | None]:
    study = optuna.create_study()
    objective = isolated(
        map_over_pool,
        start_method=method,  # type: ignore[arg-type]
        limits=Limits(wall_time=HANG),
        grace_period=0.0,
    )

    def call() -> float | None:
        study.optimize(objective, n_trials=1)
        return study.trials[-1].value

    return call


def _print_pools(name: str, count: int, call: Callable[[], float | None]) -> None:
    times: list[float] = []
    right = hung = 0
    for index in range(count):
        start = time.perf_counter()
        right += call() == 28.0
        times.append((time.perf_counter() - start) * 1e3)
        hung += times[-1] >= HANG * 1e3
        if (index + 1) % 100 == 0:
            print(f"{name}: {index + 1} trials, {hung} hung", file=sys.stderr, flush=True)
    print(f"{name:<28}{count:>8}{right:>8}{hung:>8}{statistics.median(times):>12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--pools", type=int, metavar="N", help="N trials with a Pool in each")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.pools is not None:
        measure_pools(arguments.pools)
        return
    measure_start(10 if arguments.quick else 50)
    measure_round_trip(50 if arguments.quick else 200)
    measure_overshoot(3 if arguments.quick else 10, "alone")
    with busy_processes(2):
        measure_overshoot(3 if arguments.quick else 10, "beside two busy processes")


if __name__ == "__main__":
    main()
