"""A few calls of CUDA's driver by ctypes, where no framework for GPUs is installed."""

from __future__ import annotations

import ctypes
from types import TracebackType


_OUT_OF_MEMORY = 2

# Keeps one thread busy for this many nanoseconds.
_SPIN = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .u64 %rd<5>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [nanoseconds];
    mov.u64 %rd2, %globaltimer;
AGAIN:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra AGAIN;
    ret;
}
\0"""


class CudaError(RuntimeError):
    """A call that failed."""


class Cuda:
    """The context of this process on one device.

    Args:
        device: Its number, as CUDA counts those that it shows to this process.

    Raises:
        OSError: If there is no driver.
        CudaError: If there is no such device.
    """

    def __init__(self, device: int = 0) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        number, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._device = number.value
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)
        self._spin: ctypes.c_void_p | None = None

    def __enter__(self) -> Cuda:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def allocate(self, n_bytes: int) -> ctypes.c_uint64:
        """Allocate and fill memory; return its address.

        Raises:
            CudaError: With "CUDA_ERROR_OUT_OF_MEMORY", if the device is full.
        """
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(1), ctypes.c_size_t(n_bytes))
        self._call("cuCtxSynchronize")
        return address

    def free(self, address: ctypes.c_uint64) -> None:
        """Free memory."""
        self._call("cuMemFree_v2", address)

    def spin(self, seconds: float) -> None:
        """Keep the device busy."""
        if self._spin is None:
            module, self._spin = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), _SPIN)
            self._call("cuModuleGetFunction", ctypes.byref(self._spin), module, b"spin")
        # Kernels of 0.1 s: one for all of it would block the device for others.
        for _ in range(round(seconds / 0.1)):
            span = ctypes.c_uint64(100_000_000)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(span))
            self._call("cuLaunchKernel", self._spin, *[1] * 6, 0, None, arguments, None)
            self._call("cuCtxSynchronize")

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise CudaError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        if code:
            raise CudaError(f"{function} failed with the code {code}")
