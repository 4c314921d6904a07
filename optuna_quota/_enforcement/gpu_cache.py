"""Gives back GPU memory that earlier trials of this process left in torch's cache.

Torch keeps what its tensors have freed, so that a trial in this process would be charged what an
earlier one took, and be over its limit from the start. A trial in a process of its own is not.
"""

from __future__ import annotations

import gc
import logging
import sys
from typing import Any

from optuna_quota._resources import format_amount


_logger = logging.getLogger("optuna.quota.enforcement")

# Bytes. Less is what torch keeps for itself, such as the workspaces of cuBLAS.
_NOTICEABLE = 256 * 2**20


def release_gpu_cache() -> None:
    """Give back what torch keeps of freed tensors; log what tensors still hold."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    try:
        if not torch.cuda.is_initialized():
            return
        # The error of a trial that was stopped and the frames that it passed through refer to
        # each other.
        gc.collect()
        torch.cuda.empty_cache()
        devices = range(torch.cuda.device_count())
        held = sum(torch.cuda.memory_allocated(device) for device in devices)
    except (AttributeError, RuntimeError) as error:
        _logger.info(f"Torch could not give back its cached GPU memory: {error}")
        return
    if held > _NOTICEABLE:
        _logger.warning(
            f"This process holds {format_amount('gpu_memory', held)} of GPU memory in tensors as "
            "a trial starts. Delete them, or use `isolated(objective)`: they count for each trial "
            "that runs in this process."
        )
