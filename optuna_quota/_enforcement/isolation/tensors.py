"""Tensors on their way to a trial's process, without the copies of torch's own pickling."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any


# Where its tensors and what holds their memory are defined.
TORCH_MODULES = ("torch", "torch.storage")


def reduce_torch(value: Any) -> Any:
    """Return how to pickle a tensor or its memory, None for what torch is to pickle itself."""
    is_storage = type(value).__module__ == "torch.storage"
    return reduce_storage(value) if is_storage else reduce_tensor(value)


def reduce_tensor(value: Any) -> Any:
    """Return how to pickle a tensor, None for what torch is to pickle itself.

    A tensor that was put into shared memory stays shared. Of any other on the CPU, the memory goes
    as it is.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or type(value) is not torch.Tensor or value.device.type != "cpu":
        return None
    if value.layout is not torch.strided or value.requires_grad or vars(value):
        return None
    if value.is_shared():
        reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
        return reductions.reduce_tensor(value)
    if value.is_conj() or value.is_neg() or value.is_quantized or not value.numel():
        return None
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return _rebuild, (pickle.PickleBuffer(flat.numpy()), value.dtype, tuple(value.shape))


def reduce_storage(value: Any) -> Any:
    """Return how to pickle the memory of a tensor in shared memory, None for any other."""
    # A typed storage warns that it is deprecated when it is asked itself.
    memory = getattr(value, "_untyped_storage", value)
    if memory.device.type != "cpu" or not memory.is_shared():
        return None
    reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
    if memory is value:
        return reductions.reduce_storage(value)
    return reductions.reduce_typed_storage(value)


def _rebuild(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    torch: Any = importlib.import_module("torch")
    view = memoryview(buffer)
    writable = bytearray(view) if view.readonly else view
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
