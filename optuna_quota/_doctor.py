"""Checks what this host can enforce and measure, and says how to fix what it can't.

Reading facts (``_read_…``, ``_try_…``) is separate from judging them (``check_…``), so that the
latter can be tested for other hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
from dataclasses import dataclass, replace
from importlib import metadata
import os
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any, Literal

from optuna.storages import BaseStorage
import psutil

from optuna_quota import _units
from optuna_quota._isolation.memory_limits import find_delegated, own_cgroup
from optuna_quota._metering.host import cpu_count, host_memory_limit
from optuna_quota._metering.meter import Rapl
from optuna_quota._metering.nvml import answer_in_time, GpuError, HANGS, NvmlDevice, open_devices
from optuna_quota._version import __version__


State = Literal["ok", "degraded", "missing"]
Area = Literal["stopping", "measuring", "host", "software", "storage"]

# Docker's default is 64 MiB, too little for one batch of a DataLoader's workers.
_ENOUGH_SHARED_MEMORY = 2**30
_SLOW_STORAGE = 0.05
_OPTIONAL = {
    "optuna-dashboard": "`publish` can't put notes and plots into the dashboard.",
    "plotly": "Reports have tables but no figures.",
}
# A lowered limit can't always be raised again, so it is tried in another process.
_TRY_MEMORY_LIMIT = """
import mmap, resource
budget = 64 * 2**20
hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
if 0 <= hard < budget:  # a trial keeps within it, even where the kernel would raise it
    raise SystemExit(f"the hard limit is already down to {hard} bytes")
resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))
try:
    mmap.mmap(-1, 4 * budget, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
except OSError:
    print("enforced")
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    area: Area  # The part it belongs to
    check: str  # What was checked
    state: State  # ``ok``, ``degraded`` (works with less) or ``missing``
    found: str  # What was found, in one sentence
    degrades: str = ""  # What that means; empty if it means nothing bad
    fix: str = ""  # What to do about it; empty if there is nothing to do


def _degraded(area: Area, check: str, found: str, degrades: str, fix: str) -> Finding:
    return Finding(area, check, "degraded", found, degrades, fix)


def _ok_if(condition: bool, found: str, problem: Finding) -> Finding:
    """Return a finding: ok with what was found, or the problem."""
    return Finding(problem.area, problem.check, "ok", found) if condition else problem


def examine_host() -> list[Finding]:
    """Return the findings on this host, area by area; takes some tens of milliseconds."""
    return [
        check_platform(sys.platform),
        check_kernel("kernel memory limit", _try_memory_limit()),
        check_cgroup(*_read_cgroup()),
        check_kernel("out-of-memory killer", _try_writing("/proc/self/oom_score_adj")),
        check_kernel("peak memory", _try_writing("/proc/self/clear_refs", "5")),
        check_rapl(try_rapl()),
        *_check_gpus_here(),
        *check_capacity(_read_capacity()),
        *check_versions({name: _version(name) for name in ("optuna", *_OPTIONAL)}),
    ]


def check_platform(name: str) -> Finding:
    problem = _degraded(
        "stopping",
        "platform",
        f"{platform.system()}: the kernel enforces no memory limit.",
        "Limits are enforced by sampling, and processes that a trial detaches may outlive it.",
        "Run on Linux.",
    )
    return _ok_if(name == "linux", "Linux: every kind of limit is supported.", problem)


# What a trial may do: area, state without it, the problem, what it means, the fix; what there is.
_KERNEL: dict[str, tuple[Area, State, str, str, str, str]] = {
    "kernel memory limit": (
        "stopping",
        "missing",
        "RLIMIT_DATA is not enforced: {}.",
        "`strict_memory=True` refuses no allocation: memory limits hold by sampling alone.",
        "Run on Linux 4.7 or newer, without gVisor.",
        "RLIMIT_DATA is enforced, as `strict_memory=True` needs.",
    ),
    "out-of-memory killer": (
        "stopping",
        "degraded",
        "A trial's oom_score_adj can't be raised: {}.",
        "When the host runs out of memory, the kernel may kill the worker, not the trial.",
        "Mount /proc writable in the container.",
        "When the host runs out of memory, the kernel kills the trial, not the worker.",
    ),
    "peak memory": (
        "measuring",
        "degraded",
        "The kernel's peak can't be reset: {}.",
        "Without `isolated`, a peak between two samples may be missed.",
        "Use `isolated`, or mount /proc writable in the container.",
        "The kernel keeps the exact peak of each process.",
    ),
}


def check_kernel(name: str, refused: str | None) -> Finding:
    """Check what the kernel permits; takes why it refuses, None if it does not."""
    area, state, problem, degrades, fix, permitted = _KERNEL[name]
    if refused is None:
        return Finding(area, name, "ok", permitted)
    return Finding(area, name, state, problem.format(refused), degrades, fix)


def _try_memory_limit() -> str | None:
    command = [sys.executable, "-I", "-S", "-c", _TRY_MEMORY_LIMIT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not be tried, {error}"
    if done.stdout.strip() == "enforced":
        return None
    # The last line of a traceback names the error.
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else "private memory beyond it is granted"


def check_cgroup(
    own: Path | None, delegated: Path | None, refused: str | None, files: Sequence[str]
) -> Finding:
    """Check whether each trial can have a control group, with an exact memory limit.

    ``own`` is this process's group of version 2, ``delegated`` the nearest in which groups may be
    made; ``refused`` says why none could be made there, ``files`` what the kernel offers in one.
    """
    problem = _degraded(
        "stopping",
        "control group",
        f"No group above {own} is delegated with the memory controller.",
        "`strict_memory=True` does not count shared memory, and counts each process by itself.",
        "Start with `systemd-run --user --scope -p Delegate=yes COMMAND`.",
    )
    if own is None:
        found = "This process is in no control group of version 2."
        return replace(problem, found=found, fix="Boot with systemd.unified_cgroup_hierarchy=1.")
    if delegated is None:
        return problem
    if refused is not None:
        return replace(problem, found=f"No group can be made in {delegated}: {refused}.")
    found = f"Each trial gets its own group in {delegated}."
    lacking = [name for name in ("memory.max", "cgroup.kill") if name not in files]
    degrades = f"This kernel offers no {' and no '.join(lacking)} there."
    problem = replace(problem, found=found, degrades=degrades, fix="Run on Linux 5.19 or newer.")
    return _ok_if(not lacking, found, problem)


def _read_cgroup() -> tuple[Path | None, Path | None, str | None, Sequence[str]]:
    own = own_cgroup()
    delegated = find_delegated(own)
    if delegated is None:
        return own, None, None, ()
    files, refused = try_cgroup(delegated)
    return own, delegated, refused, files


def try_cgroup(parent: Path) -> tuple[Sequence[str], str | None]:
    """Make a group and remove it; return its files, and why it could not be made."""
    group = parent / f"optuna-quota-doctor-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return (), f"{error.strerror or error}"
    try:
        return sorted(entry.name for entry in group.iterdir()), None
    finally:
        group.rmdir()


def _try_writing(path: str, text: str | None = None) -> str | None:
    """Write into a file of the kernel, by default its own content; return why that failed."""
    try:
        text = Path(path).read_text(encoding="ascii") if text is None else text
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def try_rapl(folder: Path | None = None) -> OSError | None:
    """Return why the energy counters can't be read, None if they can; takes their folder."""
    try:
        Rapl() if folder is None else Rapl(folder)
    except OSError as error:
        return error
    return None


def check_rapl(refused: OSError | None) -> Finding:
    """Check the energy counters of the processors; takes why they can't be read."""
    problem = Finding(
        "measuring",
        "CPU energy",
        "missing",
        "No RAPL counters (a virtual machine, or no Intel or AMD processor).",
        "`energy` covers GPUs only, or is unknown.",
    )
    if isinstance(refused, PermissionError):
        return replace(
            problem,
            state="degraded",
            found="RAPL counters exist, but this user may not read them.",
            fix="As root: chmod o+r /sys/class/powercap/*rapl:*/energy_uj",
        )
    return _ok_if(refused is None, "RAPL counters can be read.", problem)


# Seconds for the driver to start and answer.
_DRIVER_TIME = 60.0


def _check_gpus_here() -> list[Finding]:
    try:
        return answer_in_time(lambda: check_gpus(*open_devices()), _DRIVER_TIME)
    except GpuError as error:
        return check_gpus((), error.reason)


def check_gpus(devices: Sequence[NvmlDevice], reason: str | None) -> list[Finding]:
    remedy = "Install NVIDIA's driver; start a container with `--gpus all`."
    if reason == HANGS:
        remedy = "Reset the GPU or restart the machine: see `nvidia-smi` and the kernel's log."
    none = Finding(
        "measuring",
        "GPUs",
        "missing",
        f"NVML finds none: {reason}.",
        "`gpu_memory` and `gpu_time` are unknown.",
        remedy,
    )
    return [_check_gpu(device) for device in devices] or [none]


def _check_gpu(device: NvmlDevice) -> Finding:
    """Query a GPU once for each figure that metering needs."""
    refused: dict[str, str] = {}

    def ask(what: str, question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except GpuError as error:
            refused[what] = error.reason
            return otherwise

    processes = ask("gpu_memory of a trial", device.processes, {})
    if any(held is None for held in processes.values()):
        refused["gpu_memory of a trial"] = "the driver hides the memory of each process"
    ask("gpu_time", lambda: device.samples(time.time() - 1), [])
    ask("energy", device.joules, 0.0)
    memory = ask("gpu_memory", device.memory, None)
    shown = "memory unknown" if memory is None else _units.format_bytes(memory[1])
    is_partitioned = ask("MIG", device.is_partitioned, False)
    instances = ask("MIG", device.instances, []) if is_partitioned else []
    mig = f", {len(instances)} MIG instances" if instances else ""
    found = f"{ask('name', device.name, 'unknown model')}, {shown}{mig}."
    lacking = "; no ".join(f"{what}: {why}" for what, why in refused.items())
    problem = _degraded(
        "measuring",
        f"GPU {device.index}",
        found,
        f"No {lacking}.",
        "Update the driver; start a container with `--pid host` to see its processes.",
    )
    return _ok_if(not refused, found, problem)


@dataclass(frozen=True)
class Capacity:
    """Memory, cores, swap space and /dev/shm of the host; None if unknown.

    ``memory_limit`` and ``usable_cores`` are what processes here may use together.
    """

    memory: float
    memory_limit: float
    cores: float
    usable_cores: float
    swap: float
    shared: float | None = None
    is_overcommit_strict: bool = False


def _read_capacity() -> Capacity:
    shared, overcommit = None, ""
    with contextlib.suppress(AttributeError, OSError):
        found = os.statvfs("/dev/shm")
        shared = float(found.f_blocks * found.f_frsize)
    with contextlib.suppress(OSError):
        overcommit = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii")
    return Capacity(
        float(psutil.virtual_memory().total),
        host_memory_limit(),
        float(os.cpu_count() or 1),
        cpu_count(),
        float(psutil.swap_memory().total),
        shared,
        overcommit.strip() == "2",
    )


def check_capacity(facts: Capacity) -> list[Finding]:
    there, memory = (_units.format_bytes(n) for n in (facts.memory_limit, facts.memory))
    by = f", the container's limit (the host has {memory})"
    found = f"{there}{by if facts.memory_limit < facts.memory else ''}."
    usable, cores = (_units.format_number(n) for n in (facts.usable_cores, facts.cores))
    of = f" of {cores}, limited by affinity or the container"
    of_all = of if facts.usable_cores < facts.cores else ""
    shared = _ENOUGH_SHARED_MEMORY if facts.shared is None else facts.shared
    problems = {
        "swap": (
            facts.swap > 0,
            f"{_units.format_bytes(facts.swap)} of swap.",
            "Swapped-out memory counts, but a trial slows down long before its limit.",
            "`swapoff -a`, or memory.swap.max=0 in the control group.",
        ),
        "shared memory": (
            shared < _ENOUGH_SHARED_MEMORY,
            f"/dev/shm has {_units.format_bytes(shared)}.",
            "Workers of a DataLoader die of a bus error when it is full.",
            "Start the container with `--shm-size=8g`.",
        ),
        "overcommit": (
            facts.is_overcommit_strict,
            "The kernel grants no more memory than there is (vm.overcommit_memory is 2).",
            "An allocation may fail below the trial's limit.",
            "`sysctl vm.overcommit_memory=0`",
        ),
    }
    return [
        Finding("host", "memory", "ok", found),
        Finding("host", "CPU cores", "ok", f"{usable} usable{of_all}."),
        *(
            _degraded("host", check, *texts)
            for check, (is_found, *texts) in problems.items()
            if is_found
        ),
    ]


def check_versions(versions: dict[str, str | None]) -> list[Finding]:
    """Check optional packages; takes versions by package, None if it is not installed."""
    findings = [
        Finding("software", "Python", "ok", platform.python_version()),
        Finding("software", "optuna-quota", "ok", __version__),
    ]
    for name, version in versions.items():
        degrades, fix = _OPTIONAL.get(name, ""), f"pip install {name}"
        problem = _degraded("software", name, "Not installed.", degrades, fix)
        findings.append(_ok_if(version is not None, version or "", problem))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def examine_storage(storage: BaseStorage) -> list[Finding]:
    """Return the findings on a storage that many workers share; its errors are not caught."""
    storage.get_all_studies()  # includes the connection
    start = time.perf_counter()
    n_studies = len(storage.get_all_studies())
    seconds = time.perf_counter() - start
    database = getattr(getattr(storage, "engine", None), "name", "")
    return check_storage(
        type(storage).__name__ + (f" on {database}" if database else ""),
        n_studies,
        seconds,
        has_heartbeat=hasattr(storage, "record_heartbeat"),
        is_one_host=database == "sqlite",
    )


def check_storage(
    kind: str, n_studies: int, seconds: float, *, has_heartbeat: bool, is_one_host: bool
) -> list[Finding]:
    studies = "1 study" if n_studies == 1 else f"{n_studies} studies"
    found = f"{kind}, {studies}, listed in {_units.format_seconds(seconds)}."
    slow = _degraded(
        "storage",
        "speed",
        found,
        "Each trial queries it several times.",
        "Run the workers closer to it.",
    )
    local = _degraded(
        "storage",
        "workers",
        "SQLite: only workers on this host can share it.",
        "Its locks are not reliable on network file systems.",
        "For workers on many hosts use PostgreSQL, MySQL, Redis, or Optuna's gRPC proxy.",
    )
    silent = _degraded(
        "storage",
        "dead workers",
        "It supports no heartbeat.",
        "Reservations of a dead worker on another host are released after 2 minutes.",
        "Use a database (RDBStorage) with heartbeat_interval.",
    )
    beats = "Set RDBStorage(heartbeat_interval=60) to notice dead workers on other hosts sooner."
    return [
        _ok_if(seconds <= _SLOW_STORAGE, found, slow),
        _ok_if(not is_one_host, "Workers on many hosts can share it.", local),
        _ok_if(has_heartbeat, beats, silent),
    ]
