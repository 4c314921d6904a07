"""A thousand isolated trials with faults drawn at random: does the study survive them all?

Each trial draws one of the kinds below. At the end every row must be finished with the state and
the outcome that its kind asks for, with its reports kept, and nothing that a trial started may be
alive. The baseline is the same study in process, which a first fault of most kinds ends: it is not
run, for it would take this benchmark with it.
"""

from __future__ import annotations

import argparse
from collections import Counter
import ctypes
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import optuna
import psutil

from optuna_quota import isolated, Limits, QuotaPruner, trial_table


MIB = 2**20

# State and outcome that each kind of trial must end with.
EXPECTED = {
    "well": ("COMPLETE", "completed"),
    "pruned": ("PRUNED", "pruned"),
    "error": ("FAIL", "failed"),
    "segfault": ("FAIL", "failed"),
    "os._exit": ("FAIL", "failed"),
    "sys.exit": ("FAIL", "failed"),
    "killed from outside": ("FAIL", "failed"),
    "unpicklable": ("FAIL", "failed"),
    "invalid value": ("FAIL", "failed"),
    "own MemoryError": ("FAIL", "failed"),
    "memory": ("PRUNED", "terminated"),
    "memory at once": ("PRUNED", "terminated"),
    "shared memory": ("PRUNED", "terminated"),
    "memory of a child": ("PRUNED", "terminated"),
    "hung native call": ("PRUNED", "terminated"),
    "SIGSTOP": ("FAIL", "failed"),
    "deaf": ("PRUNED", "terminated"),
    "orphans": ("COMPLETE", "completed"),
}


def objective(trial: optuna.Trial) -> Any:
    kind = trial.suggest_categorical("kind", list(EXPECTED))
    Path(FOLDER, str(os.getpid())).touch()
    if kind != "invalid value":
        trial.report(float(trial.number), 0)
    return FAULTS[kind](trial)


def prune(trial: optuna.Trial) -> float:
    raise optuna.TrialPruned("by itself")


def fail(trial: optuna.Trial) -> float:
    raise ValueError("by itself")


def segfault(trial: optuna.Trial) -> float:
    ctypes.string_at(0)
    return 0.0


def run_out_of_memory(trial: optuna.Trial) -> float:
    raise MemoryError("made up")


def allocate(trial: optuna.Trial) -> float:
    held = []
    while True:
        held.append(np.ones(MIB, dtype=np.uint8))


def allocate_shared(trial: optuna.Trial) -> float:
    import mmap

    held = []
    while True:
        held.append(mmap.mmap(-1, MIB))
        np.frombuffer(held[-1], dtype=np.uint8)[:] = 1


def allocate_in_a_child(trial: optuna.Trial) -> float:
    subprocess.run(
        [sys.executable, "-c", "x = []\nwhile True: x.append(bytearray(2**20))"], check=False
    )
    time.sleep(60)
    return 0.0


def hang(trial: optuna.Trial) -> float:
    ctypes.PyDLL(None).sleep(60)
    return 0.0


def pause(trial: optuna.Trial) -> float:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
    return 0.0


def be_deaf(trial: optuna.Trial) -> float:
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001 - that is its fault
            continue


def leave_orphans(trial: optuna.Trial) -> float:
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                Path(FOLDER, str(os.getpid())).touch()
                time.sleep(60)
            os._exit(0)
    return 1.0


def kill_oneself(trial: optuna.Trial) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


FAULTS = {
    "well": lambda trial: 1.0,
    "pruned": prune,
    "error": fail,
    "segfault": segfault,
    "os._exit": lambda trial: os._exit(3),
    "sys.exit": lambda trial: sys.exit(3),
    "killed from outside": kill_oneself,
    "unpicklable": lambda trial: (x for x in ()),
    "invalid value": lambda trial: None,
    "own MemoryError": run_out_of_memory,
    "memory": allocate,
    "memory at once": lambda trial: float(np.ones(2**31).sum()),
    "shared memory": allocate_shared,
    "memory of a child": allocate_in_a_child,
    "hung native call": hang,
    "SIGSTOP": pause,
    "deaf": be_deaf,
    "orphans": leave_orphans,
}
FOLDER = ""


def main() -> None:
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 trials instead of 1,000")
    parser.add_argument("--n-jobs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", default=None, help="in memory by default")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    n_trials = 100 if arguments.quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = folder
        start = time.monotonic()
        study, leaks = run(n_trials, arguments)
        seconds = time.monotonic() - start
        print(f"{n_trials} trials in {seconds:.0f} s, {arguments.n_jobs} at once\n")
        print_verdicts(study)
        print(f"\nProcesses of trials that survived: {count_survivors(folder)}")
    for name, (before, after) in leaks.items():
        print(f"{name}: {before} before, {after} after")


def run(n_trials: int, arguments: argparse.Namespace) -> tuple[optuna.Study, Any]:
    study = optuna.create_study(
        storage=arguments.storage,
        # Not QuotaSampler: it would learn which kinds breach and reject them before they run.
        sampler=optuna.samplers.RandomSampler(seed=arguments.seed),
        pruner=QuotaPruner(limits=Limits(memory=256 * MIB, wall_time=4.0)),
    )
    wrapped = isolated(objective, grace_period=0.5)
    draws = random.Random(arguments.seed)
    for _ in range(n_trials):
        study.enqueue_trial({"kind": draws.choice(list(EXPECTED))})
    # A crash ends no study; but five in a row, which occur by chance, are raised nevertheless.
    options: dict[str, Any] = {"n_jobs": arguments.n_jobs, "catch": (Exception,)}
    warm_up = min(20, n_trials // 5)
    study.optimize(wrapped, n_trials=warm_up, **options)
    before = _held()
    study.optimize(wrapped, n_trials=n_trials - warm_up, **options)
    after = _held()
    return study, {name: (before[name], after[name]) for name in before}


def _held() -> dict[str, int]:
    return {
        "open descriptors": len(os.listdir("/proc/self/fd")),
        "child processes": len(psutil.Process().children(recursive=True)),
        "threads": psutil.Process().num_threads(),
        "shared-memory segments": len(os.listdir("/dev/shm")),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def print_verdicts(study: optuna.Study) -> None:
    table = trial_table(study)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for trial, outcome in zip(study.trials, table["outcome"], strict=True):
        kind = trial.params.get("kind", "none")
        total[kind] += 1
        kept = kind == "invalid value" or trial.intermediate_values == {0: float(trial.number)}
        if (trial.state.name, outcome) == EXPECTED.get(kind) and kept:
            right[kind] += 1
        else:
            reason = trial.user_attrs.get("quota:reason")
            wrong.append(f"{trial.number} {kind}: {trial.state.name}, {outcome}, {reason}")
    print(f"{'kind':<22}{'trials':>8}{'right':>8}")
    for kind in EXPECTED:
        print(f"{kind:<22}{total[kind]:>8}{right[kind]:>8}")
    print(f"{'all':<22}{sum(total.values()):>8}{sum(right.values()):>8}")
    for line in wrong:
        print(f"wrong: {line}")


def count_survivors(folder: str) -> int:
    return sum(psutil.pid_exists(int(name)) for name in os.listdir(folder))


if __name__ == "__main__":
    main()
