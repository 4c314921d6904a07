"""Failed allocations: recognize one behind an error, and decide whether a limit was the reason.

A trial at its limit, or one that filled its GPU by itself, has breached a limit. One whose GPU was
full of other processes' memory has failed, and samplers learn nothing from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
import dis
import math
import re
import signal
from types import TracebackType
from typing import Any

from optuna_quota._isolation.messages import ExitReport, FailedAllocation
from optuna_quota._metering.breach import (
    AT_LIMIT,
    Ceiling,
    Ceilings,
    find_breaches,
    find_refused_breach,
)
from optuna_quota._metering.meter import DeviceShare
from optuna_quota._resources import format_amount
from optuna_quota._usage import Breach


# Module and name of the class, a part of the message, and the kind of memory. Names, so that no
# library is imported for this.
_CLASSES = (
    ("torch", "OutOfMemoryError", "", "gpu_memory"),
    ("cupy", "OutOfMemoryError", "", "gpu_memory"),
    ("rmm", "RMMError", "out_of_memory", "gpu_memory"),
    ("tensorflow", "ResourceExhaustedError", "gpu", "gpu_memory"),
    ("tensorflow", "ResourceExhaustedError", "", "memory"),
    ("jax", "XlaRuntimeError", "resource_exhausted", "gpu_memory"),
    ("jax", "JaxRuntimeError", "resource_exhausted", "gpu_memory"),
    ("", "", "cuda out of memory", "gpu_memory"),
    ("", "", "cuda error: out of memory", "gpu_memory"),
    ("", "", "cuda_error_out_of_memory", "gpu_memory"),
    ("", "", "cudaerrormemoryallocation", "gpu_memory"),
    ("", "", "cublas_status_alloc_failed", "gpu_memory"),
    ("", "RuntimeError", "can't allocate memory", "memory"),
    ("", "RuntimeError", "not enough memory", "memory"),
    ("", "RuntimeError", "unable to allocate", "memory"),
    ("", "", "std::bad_alloc", "memory"),
    ("", "OSError", "cannot allocate memory", "memory"),
    ("", "XGBoostError", "bad_alloc", "memory"),
)
_UNITS = {"": 1, "b": 1, "bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_REQUESTED = re.compile(
    r"(?:tried to allocate|trying to allocate|unable to allocate|failed to allocate)"
    r"\s+(\d+\.?\d*)\s*([kmgt]ib|bytes)?"
)


# What other programs write to their standard error when an allocation fails.
_OTHER_MESSAGES = ("std::bad_alloc", "cannot allocate memory", "can't allocate memory")
_MAX_OUTPUT = 1 << 18


def find_failed_allocation(error: BaseException) -> FailedAllocation | None:
    """Return the failed allocation behind an exception, None without one.

    Searches the exception's causes, and the tracebacks and error output that it quotes: of a
    worker of a pool or DataLoader, of a failed subprocess, of failed fits of a search. A
    ``MemoryError`` raised by Python code itself does not count.
    """
    return next(filter(None, map(_match, _chain(error))), None)


def find_failed_allocation_in_text(text: str) -> FailedAllocation | None:
    """Return the failed allocation at the end of a traceback as text, None without one."""
    for name, message, source in _raised_in(text[-_MAX_OUTPUT:]):
        found = _match_named(name, {name.rpartition(".")[2]}, message)
        if found is not None:
            return found
        if name.endswith("MemoryError") and _is_refusal(message, source):
            return FailedAllocation("memory", _requested(message.lower()))
    return None


def _is_refusal(message: str, source: str) -> bool:
    if source:
        return not source.startswith("raise")
    # Python itself gives no message, numpy the size; other messages come from user code.
    return not message or message.startswith("Unable to allocate")


def _raised_in(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield class, message and innermost source line of each exception in a traceback."""
    indent, source = -1, ""
    for line in text.splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped.endswith("Traceback (most recent call last):"):
            indent, source = depth, ""
        elif indent < 0 or not stripped:
            continue
        elif stripped.startswith('File "'):
            source = ""
        elif depth > indent:
            source = source or stripped
        else:
            name, _, message = stripped.partition(": ")
            yield name.rstrip(":"), message, source
            indent = -1


def _quoted(error: BaseException) -> Iterator[str]:
    """Yield the output of other processes that an exception quotes beside its message."""
    for attribute in ("stderr", "stdout"):
        output = getattr(error, attribute, None)
        if isinstance(output, bytes):
            output = output.decode(errors="replace")
        if isinstance(output, str):
            yield output[-_MAX_OUTPUT:]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _match(error: BaseException) -> FailedAllocation | None:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything
        message = ""
    names = {c.__name__ for c in type(error).__mro__}
    found = _match_named(f"{type(error).__module__}.", names, message)
    if isinstance(error, MemoryError) and (found is None or found.resource == "memory"):
        # Last: libraries raise it for a GPU's memory as well.
        found = None
        if not _was_raised_by_python(error.__traceback__):
            return FailedAllocation("memory", _array_size(error) or _requested(message.lower()))
    found = found or find_failed_allocation_in_text(message)
    return found or next(filter(None, map(_match_output, _quoted(error))), None)


def _match_output(output: str) -> FailedAllocation | None:
    found = find_failed_allocation_in_text(output)
    if found is None and any(words in output.lower() for words in _OTHER_MESSAGES):
        return FailedAllocation("memory")
    return found


def _match_named(path: str, names: Collection[str], message: str) -> FailedAllocation | None:
    root, lower = path.partition(".")[0].removesuffix("lib"), message.lower()
    for module, name, words, resource in _CLASSES:
        fits = (not module or module == root) and (not name or name in names)
        if fits and words in lower:
            return FailedAllocation(resource, _requested(lower), message)  # type: ignore[arg-type]
    return None


def _array_size(error: MemoryError) -> float | None:
    shape: Any = getattr(error, "shape", None)
    size = getattr(getattr(error, "dtype", None), "itemsize", None)
    if shape is None or size is None:
        return None
    return float(size) * math.prod(float(n) for n in shape)


def _requested(text: str) -> float | None:
    found = _REQUESTED.search(text)
    return None if found is None else float(found[1]) * _UNITS[found[2] or ""]


def _was_raised_by_python(traceback: TracebackType | None) -> bool:
    if traceback is None:
        return True
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code.co_code
    position = traceback.tb_lasti
    if not 0 <= position < len(code):
        return False
    return dis.opname[code[position]] == "RAISE_VARARGS"


def find_memory_breach(
    failed: FailedAllocation,
    used: float | None,
    ceilings: Ceilings,
    elapsed: float,
    *,
    enforced: bool,
) -> Breach | None:
    """Return the limit that an allocation of memory failed at, None if it failed otherwise.

    ``used`` is the peak of the trial's memory, in bytes. If the limit is ``enforced``, the kernel
    refuses allocations beyond it, touched or not.
    """
    wanted = (used or 0.0) + (failed.requested or 0.0)
    share = 0.0 if enforced else AT_LIMIT
    return find_refused_breach(failed.resource, wanted, ceilings, elapsed, share=share)


def find_breach_at_exit(
    report: ExitReport, ceilings: Ceilings, elapsed: float, *, strict_memory: bool = False
) -> Breach | None:
    """Return the limit at which a process ended, None if it ended for another reason."""
    used = {"memory": report.memory, "cpu_time": report.cpu_time}
    found = find_breaches(used, ceilings, elapsed)
    if found:
        return found[0]
    # When an allocation fails in native code, the process ends where Python would raise; the size
    # is unknown. SIGKILL comes from outside, and a process that hangs has not ended.
    may_be_refused = strict_memory and report.exitcode not in (None, -signal.SIGKILL)
    if report.memory is not None and (report.cgroup_oom_kills or may_be_refused):
        share = 0.0 if report.cgroup_oom_kills else AT_LIMIT
        breach = find_refused_breach("memory", report.memory, ceilings, elapsed, share=share)
        if breach is not None:
            return breach
    if report.cpu_time is None or report.exitcode != -getattr(signal, "SIGXCPU", 0):
        return None
    return find_refused_breach("cpu_time", report.cpu_time, ceilings, elapsed, refused=False)


# Characters of an error's message that a reason repeats.
_MAX_TEXT = 300

_GPU_SIZE = r"(\d+\.?\d*) ([KMGT]i)B"
# PyTorch: "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 4.00 MiB
# is free. [...] Including non-PyTorch memory, this process has 1.40 GiB memory in use."
_CAPACITY = re.compile(rf"total capacity of {_GPU_SIZE}")
_FREE = re.compile(rf"of which {_GPU_SIZE} is free")
_HELD = re.compile(rf"this process has {_GPU_SIZE} memory in use")
# CuPy: "Out of memory allocating 8,000 bytes (allocated so far: 512 bytes, limit set to: 4,096
# bytes)."
_OWN_LIMIT = re.compile(
    r"allocating ([\d,]+) bytes \(allocated so far: ([\d,]+) bytes, limit set to: ([\d,]+) bytes"
)


@dataclass(frozen=True)
class GpuMemoryState:
    """GPU memory at the moment when an allocation failed, in bytes; None where unknown."""

    requested: float | None = None  # The size of the allocation
    held: float | None = None  # What the trial held on all of its GPUs
    held_there: float | None = None  # What it held on the GPU in question
    capacity: float | None = None  # The memory of that GPU
    free: float | None = None  # What was free of it
    # Whether it failed at the framework's own cap, though the GPU had room
    is_capped: bool = False

    @property
    def others(self) -> float | None:
        """Bytes that other processes held of the GPU in question."""
        if self.capacity is None or self.free is None or self.held_there is None:
            return None
        return max(0.0, self.capacity - self.free - self.held_there)


def read_gpu_memory_state(
    failed: FailedAllocation,
    peak: float | None,
    devices: Sequence[DeviceShare],
    device_memory: float | None,
) -> GpuMemoryState:
    """Return the state from the error's message, and from the driver what the message lacks.

    ``peak`` is that of the trial's GPU memory, ``device_memory`` the size of each of its GPUs, in
    bytes; ``devices`` is what they held at the moment of the error, empty if unknown.
    """
    text = failed.text
    capacity, free, held_by_text = (_size(pattern, text) for pattern in (_CAPACITY, _FREE, _HELD))
    requested, is_capped = failed.requested, False
    if requested is not None and free is not None:
        is_capped = requested <= free
    cap = _OWN_LIMIT.search(text)
    if cap is not None:
        requested, allocated, most = (float(figure.replace(",", "")) for figure in cap.groups())
        is_capped = allocated + requested > most
    held = held_there = peak
    if devices:
        fullest = min(devices, key=lambda device: device.total - device.used)
        held, held_there = sum(device.held for device in devices), fullest.held
        capacity = capacity or fullest.total
        free = fullest.total - fullest.used if free is None else free
    return GpuMemoryState(
        requested,
        _larger(held, held_by_text),
        _larger(held_there, held_by_text),
        capacity or device_memory,
        free,
        is_capped,
    )


def find_gpu_breach(state: GpuMemoryState, ceilings: Ceilings, elapsed: float) -> Breach | None:
    """Return the limit that an allocation failed at, or the GPU's size; None without one."""
    requested, share = state.requested or 0.0, 0.0 if state.is_capped else AT_LIMIT
    wanted = (state.held or 0.0) + requested
    breach = find_refused_breach("gpu_memory", wanted, ceilings, elapsed, share=share)
    if breach is not None or state.capacity is None or state.is_capped:
        return breach
    wanted = (state.held_there or 0.0) + requested
    size = {"gpu_memory": Ceiling(state.capacity)}
    return find_refused_breach("gpu_memory", wanted, size, elapsed)


def describe_full_gpu(state: GpuMemoryState, error: BaseException) -> str | None:
    """Return the reason if the trial's GPU was full of others' memory; None if uncertain."""
    if state.capacity is None or state.is_capped:
        return None
    asked = "" if state.requested is None else f" and asked for {_bytes(state.requested)} more"
    held = "an unknown part" if state.held_there is None else _bytes(state.held_there)
    others = "" if not state.others else f", {_bytes(state.others)} of it taken by other processes"
    text = " ".join(str(error).split())[:_MAX_TEXT].removesuffix(".")
    found = f"The GPU was full{others}: the trial held {held}{asked}."
    return f"{found} {type(error).__name__}: {text}." if text else found


def _bytes(amount: float) -> str:
    return format_amount("gpu_memory", amount)


def _size(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return None if found is None else float(found[1]) * _UNITS[f"{found[2].lower()}b"]


def _larger(one: float | None, other: float | None) -> float | None:
    return max((figure for figure in (one, other) if figure is not None), default=None)
