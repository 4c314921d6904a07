"""Tensors on their way to a trial's process, without the copies of torch's own pickling."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any


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


def _rebuild(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    torch: Any = importlib.import_module("torch")
    view = memoryview(buffer)
    writable = bytearray(view) if view.readonly else view
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
