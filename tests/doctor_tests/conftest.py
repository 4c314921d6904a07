"""The fake NVIDIA driver of the metering's tests."""

from __future__ import annotations

from tests.metering_tests.conftest import build_nvml
from tests.metering_tests.conftest import nvml


__all__ = ["build_nvml", "nvml"]
