"""Tensors on their way to a trial's process, without the copies of torch's own pickling."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any


def reduce_tensor(value: Any) -> Any:
    """Return how to pickle a tensor or its storage, None for what torch is to pickle itself.

    A tensor that was put into shared memory stays shared. Of any other on the CPU, the memory goes
    as it is.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or type(value) is not torch.Tensor:
        return None if torch is None else _reduce_storage(torch, value)
    if value.device.type != "cpu":
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


def _reduce_storage(torch: Any, value: Any) -> Any:
    """Return how to pickle a storage that is shared, None for any other."""
    kinds = {torch.TypedStorage: "reduce_typed_storage", torch.UntypedStorage: "reduce_storage"}
    if type(value) not in kinds or value.device.type != "cpu" or not value.is_shared():
        return None
    reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
    return getattr(reductions, kinds[type(value)])(value)


def _rebuild(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    torch: Any = importlib.import_module("torch")
    view = memoryview(buffer)
    writable = bytearray(view) if view.readonly else view
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
