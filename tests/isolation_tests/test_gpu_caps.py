"""Caps on GPU memory that the frameworks keep themselves."""

from __future__ import annotations

import os
from typing import Any

import pytest

from optuna_quota._isolation.gpu_caps import cap_torch, set_gpu_caps
from tests.isolation_tests.trials import GIB


class FakeCuda:
    def __init__(self) -> None:
        self.fractions: dict[int, float] = {}

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, device: int) -> Any:
        return type("Properties", (), {"total_memory": (device + 1) * 8 * GIB})

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        self.fractions[device] = fraction

    def is_available(self) -> bool:
        return True


def test_gpu_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    fraction, preallocate = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"
    for name in ("TF_FORCE_GPU_ALLOW_GROWTH", "CUPY_GPU_MEMORY_LIMIT", fraction, preallocate):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    set_gpu_caps(None, 8.0 * GIB)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setattr("optuna_quota._isolation.gpu_caps.after_import", lambda *_: None)
    set_gpu_caps(2.0 * GIB, 8.0 * GIB)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    # What a trial needs would not be known otherwise, and its limit would be passed at once.
    assert os.environ[preallocate] == "false"
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == str(2 * GIB)
    cuda = FakeCuda()
    cap_torch(cuda, 4.0 * GIB)
    assert cuda.fractions == {0: 0.5, 1: 0.25}
