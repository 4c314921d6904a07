"""What metering costs: CPU of this library's loop beside two common ways to do it.

Each way runs in a process of its own, with a main thread that sleeps or trains, with and without
worker processes. The figure is the CPU time of the measuring thread as a share of one core.

    python benchmarks/metering.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import importlib.util
import json
from pathlib import Path
import statistics
import subprocess
import sys
import threading
import time


PERIODS = (0.01, 0.05, 0.1)
AS_SHIPPED = 0.0  # this library's own intervals, beside the others at 100 ms
WAYS = ("this library", "psutil tree", "nvitop")


def start_this_library(period: float) -> threading.Thread:
    from optuna_quota import Limits
    from optuna_quota._metering import MeteringLoop, timing

    if period != AS_SHIPPED:
        timing.LONGEST_INTERVAL = timing.LONGEST_INTERVAL_ALONE = period
    loop = MeteringLoop()
    monitor = loop.monitor((0, 0), limits=Limits(memory="64GiB", wall_time="1h"))
    monitor.started -= 60  # as in a trial that has been running for a minute
    return find_thread("optuna-quota-metering")


def start_psutil_tree(period: float) -> threading.Thread:
    import psutil

    def run() -> None:
        me = psutil.Process()
        while True:
            tree = [me, *me.children(recursive=True)]
            sum(process.memory_info().rss for process in tree)
            sum(sum(process.cpu_times()[:2]) for process in tree)
            time.sleep(period)

    thread = threading.Thread(target=run, daemon=True, name="psutil-tree")
    thread.start()
    return thread


def start_nvitop(period: float) -> threading.Thread:
    from nvitop import ResourceMetricCollector

    before = set(threading.enumerate())
    ResourceMetricCollector(interval=period).daemonize(
        on_collect=lambda metrics: True, interval=period
    )
    return next(thread for thread in threading.enumerate() if thread not in before)


def find_thread(name: str) -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == name)


STARTERS: dict[str, Callable[[float], threading.Thread]] = {
    "this library": start_this_library,
    "psutil tree": start_psutil_tree,
    "nvitop": start_nvitop,
}


def cpu_clock(thread: threading.Thread) -> int:
    """The clock of a thread's CPU time, see clock_getcpuclockid(3)."""
    assert thread.native_id is not None
    return ~thread.native_id << 3 | 6


def wakeups(thread: threading.Thread) -> int:
    text = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    lines = (line.split() for line in text.splitlines())
    return sum(int(words[1]) for words in lines if words[0].endswith("_ctxt_switches:"))


def sleep_for(seconds: float) -> int:
    time.sleep(seconds)
    return 0


def train_for(seconds: float) -> int:
    """Steps of a small network in NumPy: some of the time in BLAS, some in Python."""
    import numpy as np

    weights, batch, steps = np.ones((256, 256)), np.ones((64, 256)), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        weights -= 1e-9 * batch.T @ np.tanh(batch @ weights)
        steps += 1
    return steps


def child(way: str, period: float, load: str, workers: int, seconds: float) -> None:
    helpers = [subprocess.Popen(["sleep", "1000"]) for _ in range(workers)]
    try:
        thread = STARTERS[way](period)
        time.sleep(0.3)
        clock = cpu_clock(thread)
        begun, used, woken = time.monotonic(), time.clock_gettime(clock), wakeups(thread)
        steps = (train_for if load == "training" else sleep_for)(seconds)
        took = time.monotonic() - begun
        share = (time.clock_gettime(clock) - used) / took
        rate = (wakeups(thread) - woken) / took
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
    print(json.dumps({"share": share, "wakeups": rate, "steps": steps / took}))


def at_rest(seconds: float) -> None:
    """The loop between trials."""
    from optuna_quota._metering import MeteringLoop

    loop = MeteringLoop()
    loop.monitor((0, 0)).close()
    thread = find_thread("optuna-quota-metering")
    time.sleep(0.3)
    used, woken = time.clock_gettime(cpu_clock(thread)), wakeups(thread)
    time.sleep(seconds)
    used, woken = time.clock_gettime(cpu_clock(thread)) - used, wakeups(thread) - woken
    print(f"Between trials: {used * 1e6:.0f} µs of CPU and {woken} wakeups in {seconds:g} s.")


def a_trial(n: int) -> None:
    """What starting and ending the metering of a trial costs, and one sample."""
    from optuna_quota._metering import MeteringLoop

    loop = MeteringLoop()
    metered, sampled = [], []
    for i in range(n):
        begun = time.perf_counter()
        monitor = loop.monitor((0, i))
        middle = time.perf_counter()
        monitor.sample()
        sampled.append(time.perf_counter() - middle)
        monitor.close()
        metered.append(time.perf_counter() - begun - sampled[-1])
    print(
        f"A trial: {statistics.median(metered) * 1e6:.0f} µs to start and end, "
        f"{statistics.median(sampled) * 1e6:.0f} µs a sample (medians of {n})."
    )


def measure(way: str, period: float, load: str, workers: int, seconds: float) -> dict[str, float]:
    if way != "this library":
        period = period or 0.1
    arguments = ["--child", way, str(period), load, str(workers), str(seconds)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(seconds: float, repeats: int) -> None:
    ways = [w for w in WAYS if w != "nvitop" or importlib.util.find_spec("nvitop")]
    if "nvitop" not in ways:
        print("nvitop is not installed (pip install nvitop): its column is left out.")
    print(f"{'CPU of the measuring thread, % of a core':42}", *(f"{w:>14}" for w in ways), "ratio")
    for load in ("sleeping", "training"):
        for workers in (0, 4):
            for period in (*PERIODS, AS_SHIPPED):
                shares = []
                for way in ways:
                    runs = [
                        measure(way, period, load, workers, seconds)["share"]
                        for _ in range(repeats)
                    ]
                    shares.append(statistics.median(runs))
                interval = f"{period * 1e3:.0f} ms" if period else "as shipped / 100 ms"
                name = f"{load}, {workers} workers, {interval}"
                figures = (f"{share * 100:13.3f}%" for share in shares)
                print(f"{name:42}", *figures, f"1/{shares[1] / shares[0]:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs, once each")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, period, load, workers, seconds = arguments.child
        child(way, float(period), load, int(workers), float(seconds))
        return
    a_trial(300 if arguments.quick else 2000)
    at_rest(2.0 if arguments.quick else 10.0)
    table(seconds=1.0 if arguments.quick else 5.0, repeats=1 if arguments.quick else 3)
    print("The ratio is this library's share to the psutil tree's.")


if __name__ == "__main__":
    main()
