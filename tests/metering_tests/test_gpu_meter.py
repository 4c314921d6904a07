"""The meter of one trial's GPU use, on fake devices in Python: no driver, no compiler."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import subprocess
import sys

import pytest

from optuna_quota._metering.gpu_meter import GpuMeter
from optuna_quota._metering.gpu_reader import GpuReader
from optuna_quota._metering.nvml import GpuSample
from optuna_quota._metering.visible_gpus import has_gpu_open


GB = 1_000_000_000.0


class Device:
    is_instance = False

    def __init__(self, identity: str = "GPU-a") -> None:
        self.identity = identity
        self.used = 0.0
        self.held: dict[int, int | None] = {}

    def processes(self) -> dict[int, int | None]:
        return dict(self.held)

    def memory(self) -> tuple[int, int]:
        return int(self.used), int(80 * GB)

    def samples(self, since: float) -> list[GpuSample]:
        return []

    def utilization(self) -> float:
        return 0.0

    def joules(self) -> float:
        return 0.0


@contextlib.contextmanager
def meter_on(reader: GpuReader, is_open: bool | None = None) -> Iterator[GpuMeter]:
    meter = GpuMeter({"gpu_memory"}, open_reader=lambda: reader, has_gpu_open=lambda pids: is_open)
    meter.read(())
    yield meter
    meter.close()


def reader_of(device: Device) -> GpuReader:
    return GpuReader([device], is_alive=lambda pid: False)


@pytest.mark.parametrize(("is_open", "memory"), [(None, 3 * GB), (True, 3 * GB), (False, None)])
def test_a_trial_with_no_gpu_open_is_not_charged_for_others(
    is_open: bool | None, memory: float | None
) -> None:
    device = Device()
    with meter_on(reader_of(device), is_open) as meter:
        device.used = 3 * GB
        found = meter.read([1]).get("gpu_memory")
    assert (found and found.value) == memory


@pytest.mark.parametrize(("from_before", "value"), [(True, None), (False, 3 * GB)])
def test_a_listed_process_without_bytes(from_before: bool, value: float | None) -> None:
    # What a process held before the trial is part of what the device held before it.
    device = Device()
    device.held = {1: None} if from_before else {}
    with meter_on(reader_of(device)) as meter:
        device.used, device.held = 3 * GB, {1: None}
        found = meter.read([1])["gpu_memory"]
    assert (found.value, found.lost) == (value, from_before)


def test_a_process_that_has_just_ended_is_not_counted() -> None:
    # Listed when the driver is asked, gone when it is asked whether there is such a process.
    class Passing(Device):
        def processes(self) -> dict[int, int | None]:
            held, self.held, self.used = self.held, {}, 0.0
            return held

    device = Passing()
    with meter_on(reader_of(device)) as meter:
        device.used, device.held = 3 * GB, {99: int(3 * GB)}
        assert meter.read([1]) == {}


def test_a_closed_meter_releases_the_devices() -> None:
    device = Device()
    reader = reader_of(device)
    with meter_on(reader) as second:
        with meter_on(reader) as first:
            device.used = 3 * GB
            assert "gpu_memory" not in second.read([1])
        assert second.read([1])["gpu_memory"].value == 3 * GB
        # A reading that was under way when it was closed.
        first.read([2])
        device.used = 5 * GB
        assert second.read([1])["gpu_memory"].value == 5 * GB


def test_each_reading_is_new() -> None:
    device = Device()
    with meter_on(reader_of(device)) as meter:
        for used in (1, 2, 3):
            device.used = used * GB
            assert meter.read([1])["gpu_memory"].value == used * GB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the files")
def test_the_files_that_a_process_has_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert has_gpu_open([os.getpid()]) in (None, True, False)
    gpu = tmp_path / "nvidia0"
    gpu.touch()
    monkeypatch.setattr("optuna_quota._metering.visible_gpus._DRIVER_FILES", (str(gpu),))
    monkeypatch.setattr("optuna_quota._metering.visible_gpus._GPU_FILES", (str(gpu),))
    with gpu.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        assert has_gpu_open([process.pid]) is True
        process.kill()
    assert has_gpu_open([process.pid]) is False
    monkeypatch.setattr("optuna_quota._metering.visible_gpus._DRIVER_FILES", ())
    assert has_gpu_open([os.getpid()]) is None
