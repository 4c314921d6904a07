"""The meter of one trial's GPU use, on fake devices in Python: no driver, no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import math
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

import pytest

from optuna_quota._metering import nvml
from optuna_quota._metering.gpu_meter import GpuMeter
from optuna_quota._metering.gpu_reader import GpuReader
from optuna_quota._metering.host import has_gpu_open
from optuna_quota._metering.nvml import GpuSample
from tests.waiting import until


GB = 1_000_000_000.0


@pytest.fixture(autouse=True)
def driver() -> None:
    """Forget that an earlier test has found no driver: queries would not use the thread."""
    nvml.open_devices.cache_clear()


class Device:
    is_instance = False

    def __init__(self, identity: str = "GPU-a") -> None:
        self.identity = identity
        self.used = 0.0
        self.held: dict[int, int | None] = {}
        self.energy, self.n_totals = 0.0, 0
        self.sampled: list[GpuSample] = []

    def processes(self) -> dict[int, int | None]:
        return dict(self.held)

    def memory(self) -> tuple[int, int]:
        return int(self.used), int(80 * GB)

    def samples(self, since: float) -> list[GpuSample]:
        return [sample for sample in self.sampled if sample.seconds > since]

    def utilization(self) -> float:
        return 0.0

    def joules(self) -> float:
        self.n_totals += 1
        return self.energy


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


def test_totals_are_read_less_often_than_memory_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optuna_quota._metering.gpu_meter._TOTALS_PERIOD", 1000.0)
    device = Device()
    with meter_on(reader_of(device)) as meter:
        for held in (1, 2, 3):
            device.held, device.energy = {1: held}, 70.0
            found = meter.read([1])
            assert (found["gpu_memory"].value, found["energy"].value) == (held, 0.0)
        assert device.n_totals == 1
        assert meter.read([1], fully=True)["energy"].value == 70.0
        assert device.n_totals == 2


def test_a_process_is_not_charged_for_the_time_before_it_began() -> None:
    device = Device()
    reader = reader_of(device)
    with meter_on(reader) as meter:
        # As after a long while in which the device was idle.
        reader._devices[0]._sampled -= 100.0
        device.held = {1: 5}
        meter.read([1])
        began = reader.latest.at
        device.sampled = [GpuSample(1, began + 3.0, 0.5)]
        assert meter.read([1], fully=True)["gpu_time"].value == pytest.approx(1.5)
        device.sampled.append(GpuSample(1, began + 7.0, 1.0))
        assert meter.read([1], fully=True)["gpu_time"].value == pytest.approx(5.5)


def work(seconds: float) -> None:
    """Use this much CPU time in this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_readings_that_take_long_are_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_quota._metering.gpu_meter._MAX_LOAD", 0.5)
    device = Device()
    reader = reader_of(device)
    with meter_on(reader) as meter, monkeypatch.context() as patch:
        meter.read([1])
        assert meter.period == 0.02
        # A driver that lets others wait while a process starts CUDA does not work meanwhile.
        patch.setattr(device, "memory", lambda: time.sleep(0.2) or (0, 1))
        meter.read([1])
        assert meter.period == 0.02
        patch.setattr(device, "memory", lambda: work(0.1) or (0, 1))
        meter.read([1])
        assert 0.2 <= meter.period <= 0.25
        # Of totals alone, memory is read as often as before.
        patch.undo()
        patch.setattr(device, "joules", lambda: work(0.1) or 0.0)
        meter.read([1], fully=True)
        assert reader.totals_cost >= 0.1
        assert meter.period == 0.02


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the files")
def test_the_files_that_a_process_has_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert has_gpu_open([os.getpid()]) in (None, True, False)
    gpu = tmp_path / "nvidia0"
    gpu.touch()
    monkeypatch.setattr("optuna_quota._metering.host._DRIVER_FILES", (str(gpu),))
    monkeypatch.setattr("optuna_quota._metering.host._GPU_FILES", (str(gpu),))
    with gpu.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        assert has_gpu_open([process.pid]) is True
        process.kill()
    assert has_gpu_open([process.pid]) is False
    monkeypatch.setattr("optuna_quota._metering.host._DRIVER_FILES", ())
    assert has_gpu_open([os.getpid()]) is None


class Hanging(Device):
    """A device whose driver hangs in calls while ``answers`` is clear."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.asked = threading.Event(), threading.Event()
        self.answers.set()
        self.n_readings = 0

    def memory(self) -> tuple[int, int]:
        self.n_readings += 1
        self.asked.set()
        assert self.answers.wait(30)
        return super().memory()


@contextlib.contextmanager
def hanging(device: Hanging, reader: GpuReader) -> Iterator[None]:
    """Let the driver hang in a reading of another thread."""
    device.answers.clear()
    device.asked.clear()
    thread = threading.Thread(target=reader.read)
    thread.start()
    assert device.asked.wait(30)
    try:
        yield
    finally:
        device.answers.set()
        thread.join()


def test_while_the_driver_hangs_trials_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Hanging()
    reader = reader_of(device)
    with meter_on(reader) as before, meter_on(reader) as ended:
        with hanging(device, reader), monkeypatch.context() as patch:
            patch.setattr(nvml, "ANSWER_TIME", 0.05)
            assert before.read([1]) == {}
            ended.close()
            assert ended.read([2]) == {}  # as by another thread, which was about to
            assert reader.is_exclusive(before)
            begun = GpuMeter({"gpu_memory"}, open_reader=lambda: reader)
            lost = begun.read(())
            assert lost["gpu_memory"].lost and begun.period == math.inf
        device.used, device.held = 3 * GB, {1: int(3 * GB)}
        until(lambda: before.read([1]))
        assert before.read([1])["gpu_memory"].value == 3 * GB
        # Of a trial whose beginning is not known, nothing is; the driver is not asked any more.
        n_readings = device.n_readings
        assert begun.read([1]) == {} and begun.period == math.inf
        assert device.n_readings == n_readings


def test_threads_that_wait_for_a_reading_share_the_next() -> None:
    device = Hanging()
    reader = reader_of(device)
    begun = time.time()
    with ThreadPoolExecutor(8) as pool:
        with hanging(device, reader):
            readings = [pool.submit(reader.read) for _ in range(8)]
            while pool._work_queue.qsize():
                time.sleep(0.001)
            time.sleep(0.05)  # all of them wait for the lock; those that do not make no difference
        found = {id(each.result()) for each in readings}
    assert all(each.result().at >= begun for each in readings)
    assert (len(found), device.n_readings) == (1, 2)
