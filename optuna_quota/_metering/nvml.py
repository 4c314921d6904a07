"""NVIDIA's management library (NVML): the only module that uses pynvml.

All errors of pynvml become a :class:`GpuError` with a reason in words, which says whether it is
permanent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
import ctypes
from dataclasses import dataclass
import functools
import os
import queue
import sys
import threading
from typing import Any, TypeVar


class GpuError(Exception):
    """A query that NVML does not answer."""

    def __init__(
        self, reason: str, *, final: bool = False, nothing: bool = False, lost: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason  # Why, as the end of a sentence
        # Whether no more queries are possible: of the device if ``lost``, else of NVML.
        self.final = final
        self.nothing = nothing  # Whether there is just no data at this moment
        self.lost = lost  # Whether this device alone is lost


@dataclass(frozen=True)
class GpuSample:
    """The share of a sampling period, 0 to 1, in which a kernel of a process ran.

    ``seconds`` is when the period ended, in seconds since 1970.
    """

    pid: int
    seconds: float
    busy: float


# By the code, see nvmlReturn_t in NVIDIA's nvml.h: the reason, and how a GpuError is marked.
_FINAL = {"final": True}
_LOST = {"final": True, "lost": True}
_TOO_OLD = "the driver is too old for it"
_ERRORS: dict[str, tuple[str, dict[str, bool]]] = {
    "UNINITIALIZED": ("NVML was shut down", _FINAL),
    "DRIVER_NOT_LOADED": ("the NVIDIA driver is not loaded", _FINAL),
    "LIBRARY_NOT_FOUND": ("NVML's library was not found", _FINAL),
    "LIB_RM_VERSION_MISMATCH": ("NVML's version is not the driver's", _FINAL),
    "UNKNOWN": ("the NVIDIA driver failed", _FINAL),
    "OPERATING_SYSTEM": ("the NVIDIA driver was blocked by the operating system", _FINAL),
    "GPU_IS_LOST": ("a GPU is lost to the driver", _LOST),
    "RESET_REQUIRED": ("a GPU must be reset", _LOST),
    "IRQ_ISSUE": ("the NVIDIA driver has a problem with a GPU's interrupts", _LOST),
    "NOT_SUPPORTED": ("the GPU does not support it", {}),
    "NO_PERMISSION": ("the driver does not permit it", {}),
    "FUNCTION_NOT_FOUND": (_TOO_OLD, {}),
    "ARGUMENT_VERSION_MISMATCH": ("the driver's version does not match", {}),
    **dict.fromkeys(("NOT_FOUND", "NO_DATA", "NOT_READY"), ("", {"nothing": True})),
}


class NvmlDevice:
    """One GPU, or one MIG instance of it; ``index`` is that of the GPU in NVML's order."""

    def __init__(self, pynvml: Any, handle: Any, index: int, *, is_instance: bool = False) -> None:
        self._pynvml = pynvml
        self._handle = handle
        self.index = index
        self.is_instance = is_instance

    @functools.cached_property
    def identity(self) -> str:
        """The UUID, or an index of its own if the driver does not report it."""
        try:
            return self.uuid()
        except GpuError:
            return f"{self.index}/{id(self)}" if self.is_instance else str(self.index)

    def name(self) -> str:
        return str(self._call("nvmlDeviceGetName"))

    def uuid(self) -> str:
        """Return the identifier that CUDA_VISIBLE_DEVICES takes."""
        return str(self._call("nvmlDeviceGetUUID"))

    def processes(self) -> dict[int, int | None]:
        """Return the bytes that each compute process holds, None if the driver hides them."""
        found = self._call("nvmlDeviceGetComputeRunningProcesses")
        return {int(p.pid): _amount(p.usedGpuMemory) for p in found}

    def memory(self) -> tuple[int, int]:
        """Return the bytes in use by any process, and in total."""
        info = self._call("nvmlDeviceGetMemoryInfo")
        return int(info.used), int(info.total)

    def samples(self, since: float) -> list[GpuSample]:
        """Return the utilization by process sampled since a moment, in seconds since 1970."""
        try:
            found = self._call("nvmlDeviceGetProcessUtilization", int(since * 1e6))
        except GpuError as error:
            if error.nothing:
                return []
            raise
        return [GpuSample(int(s.pid), s.timeStamp / 1e6, min(s.smUtil, 100) / 100) for s in found]

    def utilization(self) -> float:
        """Return the share of the driver's last sampling period in which a kernel ran, 0 to 1."""
        return min(int(self._call("nvmlDeviceGetUtilizationRates").gpu), 100) / 100

    def bus(self) -> tuple[int, int, int]:
        place = self._call("nvmlDeviceGetPciInfo")
        return int(place.domain), int(place.bus), int(place.device)

    def joules(self) -> float:
        """Return the energy that the device has used since the driver was loaded."""
        return int(self._call("nvmlDeviceGetTotalEnergyConsumption")) / 1e3

    def is_partitioned(self) -> bool:
        try:
            current, _ = self._call("nvmlDeviceGetMigMode")
        except GpuError as error:
            if error.final:
                raise
            return False
        return bool(current)

    def instances(self) -> list[NvmlDevice]:
        found = []
        for i in range(int(self._call("nvmlDeviceGetMaxMigDeviceCount"))):
            try:
                handle = self._call("nvmlDeviceGetMigDeviceHandleByIndex", i)
            except GpuError as error:
                if not error.nothing:
                    raise
            else:
                found.append(NvmlDevice(self._pynvml, handle, self.index, is_instance=True))
        return found

    def _call(self, function: str, *arguments: Any) -> Any:
        return _call(self._pynvml, function, self._handle, *arguments)


@functools.lru_cache(maxsize=1)
def open_devices() -> tuple[Sequence[NvmlDevice], str | None]:
    """Return all devices by their place on the PCI bus, or none and why NVML can't be used.

    A failure is cached as well, since it takes 0.2 ms with a missing library and longer with a
    broken driver. It is cached as text: the traceback of an exception would keep the objects of
    its frames alive, such as a user's model.
    """
    try:
        return _open_devices(), None
    except GpuError as error:
        return (), error.reason


T = TypeVar("T")

HANGS = "the driver hangs"
# Seconds. Without its persistence mode, a driver takes one or two to start for each GPU.
ANSWER_TIME = 10.0


class DriverThread:
    """Queries the driver in a thread, since it may hang and no trial should wait for it.

    One thread makes all queries: starting one takes longer than a query.
    """

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]
        self._questions = queue.SimpleQueue()
        self._late: Future[Any] | None = None  # A query that was not answered in time
        self._starting = threading.Lock()
        self._is_started = False

    def start(self) -> None:
        """Start the thread unless it runs; raises RuntimeError where none can be started."""
        with self._starting:
            if not self._is_started:
                thread = threading.Thread(target=self._run, name="optuna-quota-gpu", daemon=True)
                thread.start()
                self._is_started = True

    def ask(self, question: Callable[[], T], seconds: float) -> T:
        if self._late is not None and not self._late.done():
            raise GpuError(HANGS)
        answer: Future[T] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(seconds)
        except TimeoutError:
            if answer.done():
                return answer.result()  # it came just now, or raises this itself
            self._late = answer
            raise GpuError(HANGS) from None

    def _run(self) -> None:
        while True:
            question, answer = self._questions.get()
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001 - the asking thread raises it
                answer.set_exception(error)
            # Keep nothing of this query alive until the next one.
            del question, answer


_driver_thread = DriverThread()


def forget_driver() -> None:
    """Discard what is known of the driver, and the thread that a fork does not have."""
    global _driver_thread
    _driver_thread = DriverThread()
    open_devices.cache_clear()


def answer_in_time(question: Callable[[], T], seconds: float | None = None) -> T:
    """Query the driver; raise GpuError if it does not answer in time.

    It is not queried again until it has answered. No thread is started if :func:`open_devices` has
    found no driver, as on most machines.
    """
    if open_devices.cache_info().currsize and open_devices()[1] is not None:
        return question()
    thread = _driver_thread
    try:
        thread.start()
    except RuntimeError:  # no further thread is allowed here
        return question()
    return thread.ask(question, ANSWER_TIME if seconds is None else seconds)


def _open_devices() -> list[NvmlDevice]:
    if sys.platform.startswith("linux"):
        try:
            # Importing pynvml takes far longer than checking for a driver.
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise GpuError("no NVIDIA driver was found", final=True) from error
    try:
        import pynvml
    except ImportError as error:
        raise GpuError("the package nvidia-ml-py is not installed", final=True) from error
    _call(pynvml, "nvmlInitWithFlags", 0)
    devices, lost = [], False
    for i in range(int(_call(pynvml, "nvmlDeviceGetCount"))):
        try:
            handle = _call(pynvml, "nvmlDeviceGetHandleByIndex", i)
            devices.append(NvmlDevice(pynvml, handle, i))
        except GpuError as error:
            if not error.lost:
                raise
            lost = True
    if not devices:
        reason = "all GPUs are lost to the driver" if lost else "the NVIDIA driver found no GPU"
        raise GpuError(reason, final=True)
    try:
        return sorted(devices, key=NvmlDevice.bus)
    except GpuError:
        return devices  # in NVML's order, which is mostly the same


def _call(pynvml: Any, function: str, *arguments: Any) -> Any:
    """Call a function of pynvml; everything that it raises becomes a GpuError."""
    try:
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError as error:
        raise _translate(pynvml, error) from error
    except (pynvml.NVMLLibraryMismatchError, AttributeError) as error:
        raise GpuError(_TOO_OLD) from error
    except (OSError, ValueError, ctypes.ArgumentError, UnicodeDecodeError) as error:
        raise GpuError(f"NVML returned an unreadable answer ({error})") from error


def _translate(pynvml: Any, error: Any) -> GpuError:
    code = getattr(error, "value", None)
    codes = (name for name in _ERRORS if code == getattr(pynvml, f"NVML_ERROR_{name}", object()))
    reason, marks = _ERRORS.get(next(codes, ""), ("", {}))
    return GpuError(reason or f"NVML says {str(error)!r}", **marks)


def _amount(value: Any) -> int | None:
    # NVML_VALUE_NOT_AVAILABLE is -1 as an unsigned number of 64 bits; pynvml gives None for it.
    return None if value is None or value in (-1, 2**64 - 1) else int(value)


@functools.lru_cache(maxsize=1)
def driver_is_present() -> bool:
    return any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia/version")))
