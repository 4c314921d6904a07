"""What is measured and enforced on a real NVIDIA GPU, part by part.

Needs an NVIDIA GPU with its driver and no network: memory is taken and kernels are run by the
driver's own API; where PyTorch, CuPy or JAX for CUDA are installed, their caps are tried too.
Takes three minutes, with ``--quick`` one. With ``--tests``, ``pytest -m gpu`` runs first, so that
one command does all:

    python benchmarks/gpu.py --tests
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib.util
import logging
import math
import os
from pathlib import Path
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from cuda_driver import Cuda
import optuna

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table
from optuna_quota._metering.gpu_meter import gpu_reader
from optuna_quota._metering.host import visible_gpus
from optuna_quota._metering.nvml import GpuError


MIB = 2**20
BLOCK = 64 * MIB


def run(objective: Callable[..., Any], n_trials: int = 1, n_jobs: int = 1, **limits: Any) -> Any:
    """Run isolated trials with a GPU each; return the trial table."""
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(), quota=Quota(n_trials=1000), gpus_per_trial=1
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(**limits)))
    study.optimize(isolated(objective), n_trials=n_trials, n_jobs=n_jobs)
    table = trial_table(study)
    for name in study.trials[0].user_attrs:
        if not name.startswith("quota:"):
            table[name] = [trial.user_attrs.get(name) for trial in study.trials]
    return table


def hold(trial: optuna.Trial) -> float:
    """Hold 1, 2, ... GiB for two seconds."""
    n_bytes = (1 + trial.number % 2) * 1024 * MIB
    with Cuda() as cuda:
        cuda.allocate(n_bytes)
        trial.set_user_attr("allocated", n_bytes)
        time.sleep(2)
    return 1.0


def grow(trial: optuna.Trial, context: float) -> float:
    """Allocate a block each 10 ms, far over 1 GiB; note when that was passed.

    Args:
        trial: The trial.
        context: Bytes that the driver's own context takes.
    """
    held = context
    with Cuda() as cuda:
        for _ in range(256):
            cuda.allocate(BLOCK)
            if held <= 1024 * MIB < held + BLOCK:
                trial.set_user_attr("passed", time.time())
            held += BLOCK
            time.sleep(0.01)
    return 1.0


def spin(trial: optuna.Trial) -> float:
    """Keep the device busy for five seconds; note the device's own energy counter."""
    (device,) = visible_gpus(os.environ).devices
    with Cuda() as cuda:
        before = device.joules()
        cuda.spin(5.0)
        trial.set_user_attr("joules", device.joules() - before)
    return 1.0


def fill_torch(trial: optuna.Trial) -> float:
    """Ask torch for twice the limit at once."""
    import torch

    torch.empty(2048 * MIB, dtype=torch.uint8, device="cuda")
    return 1.0


def fill_cupy(trial: optuna.Trial) -> float:
    """Ask CuPy for twice the limit at once."""
    import cupy

    cupy.empty(2048 * MIB, dtype=cupy.uint8)
    return 1.0


def fill_jax(trial: optuna.Trial) -> float:
    """Ask JAX for twice the limit at once; it tries for ten seconds."""
    import jax

    jax.numpy.ones(2048 * MIB, dtype=jax.numpy.uint8).block_until_ready()
    return 1.0


def cache_torch(trial: optuna.Trial) -> float:
    """Hold 1 GiB with torch at the end: its cache keeps it until the process ends."""
    import torch

    torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")
    return 1.0


def show_machine(quick: bool) -> Iterator[str]:
    for device in visible_gpus(os.environ).devices:
        used, total = device.memory()
        yield f"{device.name()}, {total / 2**30:.1f} GiB, {used / 2**30:.2f} GiB in use"
    is_container = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    with Cuda() as cuda:
        cuda.allocate(BLOCK)
        listed = [device.processes() for device in visible_gpus(os.environ).devices]
    is_listed = any(os.getpid() in each for each in listed)
    yield f"in a container: {is_container}; the driver lists this process by its pid: {is_listed}"


def show_attribution(quick: bool) -> Iterator[str]:
    for row in run(hold, n_trials=2, gpu_memory="8GiB").itertuples():
        allocated = row.allocated / MIB
        yield f"allocated {allocated:.0f} MiB, " + describe_memory(row)


def show_container(quick: bool) -> Iterator[str]:
    """Attribute usage in a PID namespace of its own, as a container has."""
    enter = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which(enter[0]) is None or os.geteuid():
        yield "only root can make a PID namespace, with `unshare`"
        return
    command = [sys.executable, __file__, "--quick", "machine", "attribution", "limit"]
    yield from subprocess.run(
        [*enter, *command], stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout.splitlines()


def show_two_at_once(quick: bool) -> Iterator[str]:
    for row in run(hold, n_trials=2, n_jobs=2, gpu_memory="8GiB").itertuples():
        yield f"allocated {row.allocated / MIB:.0f} MiB, " + describe_memory(row)


def describe_memory(row: Any) -> str:
    if row.gpu_memory != row.gpu_memory:
        return f"not measured; {row.outcome}"
    return f"recorded {row.gpu_memory / MIB:.0f} MiB by {row.gpu_source}; {row.outcome}"


def show_overshoot(quick: bool) -> Iterator[str]:
    over, back = [], []
    (row,) = run(hold, gpu_memory="8GiB").itertuples()
    objective = functools.partial(grow, context=row.gpu_memory - row.allocated)
    for _ in range(3 if quick else 10):
        (row,) = run(objective, gpu_memory="1GiB").itertuples()
        ended = time.time()
        if row.outcome != "terminated":
            yield f"not stopped: {row.outcome}: {row.reason}"
            continue
        over.append(row.gpu_memory / MIB - 1024)
        back.append(ended - row.passed)
    if over:
        yield f"past 1 GiB: median {statistics.median(over):.0f} MiB, worst {max(over):.0f} MiB"
        yield (
            f"from the limit to control back: median {1e3 * statistics.median(back):.0f} ms, "
            f"worst {1e3 * max(back):.0f} ms"
        )


def show_polling_cost(quick: bool) -> Iterator[str]:
    reader = gpu_reader()
    costs, totals_costs, whole = [], [], []
    for _ in range(20 if quick else 100):
        reader.read()
        costs.append(reader.cost)
        totals_costs.append(reader.totals_cost)
        begun = time.perf_counter()
        reader.read(totals_age=math.inf)
        whole.append(time.perf_counter() - begun)
        time.sleep(0.01)
    yield f"of {len(reader.identities)} devices, median (worst): memory {describe_times(costs)}"
    yield f"memory with the thread that asks for it: {describe_times(whole)}"
    yield f"busy time and energy: {describe_times(totals_costs)}"


def describe_times(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.2f} ({1e3 * max(seconds):.2f}) ms"


def show_energy(quick: bool) -> Iterator[str]:
    (row,) = run(spin).itertuples()
    yield f"busy for 5 s: gpu_time {row.gpu_time:.2f} s"
    yield f"energy {row.energy:.0f} J; by the device's counter meanwhile {row.joules:.0f} J"


def show_caps(quick: bool) -> Iterator[str]:
    for name, fill in {"torch": fill_torch, "cupy": fill_cupy, "jax": fill_jax}.items():
        if importlib.util.find_spec(name) is None:
            yield f"{name} is not installed"
            continue
        (row,) = run(fill, gpu_memory="1GiB").itertuples()
        yield f"{name}, 2 GiB at once under 1 GiB: {row.outcome}: {row.reason}"
        yield f"{name} held {describe_memory(row)}"


def show_peaks(quick: bool) -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        yield "torch is not installed"
        return
    rows = run(cache_torch, n_trials=3 if quick else 10).itertuples()
    peaks = [row.gpu_memory / MIB for row in rows]
    yield f"1024 MiB as a torch trial ends: {min(peaks):.0f} to {max(peaks):.0f} MiB recorded"


PARTS: dict[str, Callable[[bool], Iterator[str]]] = {
    "machine": show_machine,
    "attribution": show_attribution,
    "two at once": show_two_at_once,
    "peaks": show_peaks,
    "limit": show_overshoot,
    "polling": show_polling_cost,
    "time and energy": show_energy,
    "caps": show_caps,
    "container": show_container,
}


def main() -> int:
    """Run the parts, each on its own: one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tests", action="store_true", help="run pytest -m gpu first")
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna.quota").setLevel(logging.INFO)
    code = 0
    if options.tests:
        folder = Path(__file__).parents[1]
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu"]
        code = subprocess.run(
            [*command, "tests/metering_tests/test_real_gpu.py"], cwd=folder
        ).returncode
    try:
        visible_gpus(os.environ)
    except GpuError as error:
        print(f"There is no GPU to measure: {error.reason}.")
        return 1
    for name in options.parts:
        part = PARTS[name]
        begun = time.monotonic()
        try:
            for line in part(options.quick):
                print(f"{name:16} {line}", flush=True)
        except Exception as error:  # noqa: BLE001 - the other parts are worth running
            print(f"{name:16} FAILED: {error!r}", flush=True)
            code = 1
        with contextlib.suppress(BrokenPipeError):
            print(f"{'':16} ({time.monotonic() - begun:.0f} s)", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
