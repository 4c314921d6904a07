"""Pickle tensors of torch without the copies that torch's own pickling makes."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any


def reduce_tensor(value: Any) -> Any:
    """Return how to pickle a tensor or its storage without the copies of torch's own pickling.

    A tensor in shared memory stays shared. Of any other on the CPU, the memory goes as it is; for
    the rest, which torch is to pickle, this is None.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    reducers = {
        torch.Tensor: "reduce_tensor",
        torch.TypedStorage: "reduce_typed_storage",
        torch.UntypedStorage: "reduce_storage",
    }
    kind = type(value)
    if kind not in reducers:
        return None
    # A typed storage's own attributes are deprecated, each with a warning.
    memory = value._untyped_storage if kind is torch.TypedStorage else value
    if memory.device.type != "cpu":
        return None
    is_tensor = kind is torch.Tensor
    if is_tensor and (value.layout is not torch.strided or value.requires_grad or vars(value)):
        return None
    if memory.is_shared():
        reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
        return getattr(reductions, reducers[kind])(value)
    if not is_tensor or not value.numel() or value.is_quantized:
        return None
    if value.is_conj() or value.is_neg():
        return None
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return _make_tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, tuple(value.shape))


def _make_tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    torch: Any = importlib.import_module("torch")
    writable = bytearray(buffer) if memoryview(buffer).readonly else buffer
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
