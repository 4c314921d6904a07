"""Meters: the protocol of users' own, their faults, and lost resources."""

from __future__ import annotations

import os
from pathlib import Path
import sys
import threading
from typing import Any

import optuna
import psutil
import pytest

from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, Usage
from optuna_quota._metering import check_names
from optuna_quota._metering.loop import MeteringLoop
from optuna_quota._metering.meter import (
    forget_warnings,
    host_busy,
    MeterReading,
    ProcessorEnergyMeter,
    Rapl,
)
from optuna_quota.testing import (
    check_meter,
    fake_metering,
    FakeClock,
    FakeMeter,
    FakeMetering,
    FakeProcessTree,
)


GIB = 2**30
KEY = (1, 1)
OTHER = (1, 2)


def test_a_users_meter_end_to_end() -> None:
    meter = FakeMeter("licences", 1.0)

    def objective(trial: optuna.Trial) -> float:
        meter.value = 1.0 + trial.number
        trial.report(0.0, 0)
        metering.advance(0.2)
        if trial.should_prune():
            raise optuna.TrialPruned
        return 0.0

    with fake_metering() as metering:
        study = optuna.create_study(
            sampler=QuotaSampler(quota=Quota(n_trials=100)),
            pruner=QuotaPruner(
                optuna.pruners.NopPruner(), limits=Limits(custom={"licences": 2}), meters=[meter]
            ),
        )
        study.optimize(objective, n_trials=3)
    outcomes = [trial.user_attrs["quota:outcome"] for trial in study.trials]
    assert outcomes == ["completed", "completed", "terminated"]
    assert [trial.user_attrs["quota:licences"] for trial in study.trials] == [1.0, 2.0, 3.0]
    assert study.trials[2].user_attrs["quota:breach"]["resource"] == "licences"


class Unnamed:
    peak = True

    def read(self, pids: object) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("meters", "error"),
    [
        ([Unnamed()], TypeError),
        ([FakeMeter("memory")], ValueError),
        ([FakeMeter("outcome")], ValueError),
        ([FakeMeter("value")], ValueError),
        ([FakeMeter("params_x")], ValueError),
        ([FakeMeter("two words")], ValueError),
        ([FakeMeter("a"), FakeMeter("a")], ValueError),
    ],
)
def test_invalid_meters(meters: list[FakeMeter], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"must|name"):
        check_names(meters)


@pytest.mark.parametrize(
    ("period", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        ("1s", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_period_is_a_positive_number(period: Any, error: type[Exception]) -> None:
    meter = FakeMeter("licences")
    meter.period = period  # type: ignore[attr-defined]
    with pytest.raises(error, match="`period` must be a positive number of seconds but got"):
        QuotaPruner(meters=[meter])


@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "text"])
def test_check_meter_finds_faults(value: float) -> None:
    with pytest.raises(AssertionError):
        check_meter(FakeMeter("mine", value))
    check_meter(FakeMeter("mine", 3.0))
    check_meter(FakeMeter("mine", None))


def test_a_meter_that_reads_a_peak(fake: FakeMetering) -> None:
    meter = FakeMeter("scratch", 3.0)
    monitor = fake.loop.monitor(KEY, limits=Limits(custom={"scratch": 8}), meters=[meter])
    meter.value = 7.0
    fake.advance(0.2)
    meter.value = 2.0
    fake.advance(0.2)
    assert monitor.usage().custom == {"scratch": 7.0} and monitor.breach is None
    meter.value = 9.0
    fake.advance(0.2)
    assert monitor.breach is not None and monitor.breach.resource == "scratch"


def test_a_meter_that_reads_a_running_total(fake: FakeMetering) -> None:
    meter = FakeMeter("requests", 1000.0, peak=False)
    monitor = fake.loop.monitor(KEY, meters=[meter])
    meter.value = 1007.0
    assert monitor.close().custom == {"requests": 7.0}


def test_two_readings_are_needed_for_a_growth(fake: FakeMetering) -> None:
    meter = FakeMeter("requests", None, peak=False)
    monitor = fake.loop.monitor(KEY, meters=[meter])
    meter.value = 5.0
    assert monitor.close().custom == {}


@pytest.mark.parametrize(
    "value", [RuntimeError("broken"), KeyError("x"), float("nan"), -1.0, "a string"]
)
def test_a_faulty_meter_is_one_warning_and_nothing_else_suffers(
    fake: FakeMetering,
    warned: list[str],
    value: float | Exception,
) -> None:
    meter = FakeMeter("scratch", value)
    for key in (KEY, OTHER):
        monitor = fake.loop.monitor(key, limits=Limits(memory=GIB), meters=[meter])
        fake.tree.memory = 2 * GIB
        fake.advance(1.0)
        usage = monitor.close()
        assert usage.custom == {} and usage.memory == 2 * GIB
        assert monitor.breach is not None
    assert meter.reads > 4
    [message] = warned
    assert "scratch is not measured" in message


def test_a_meter_may_set_its_period(fake: FakeMetering) -> None:
    slow, fast = FakeMeter("slow"), FakeMeter("fast")
    slow.period = 5.0  # type: ignore[attr-defined]  # an optional attribute of the protocol
    fake.loop.monitor(KEY, meters=[slow, fast])
    fake.advance(9.9)
    assert slow.reads <= 3
    assert fast.reads > 90


def test_a_meter_that_hangs_does_not_hold_up_the_clock() -> None:
    """With a meter that hangs in another thread, samples and the end of the trial don't wait."""
    stuck, release = threading.Event(), threading.Event()

    class Stuck(FakeMeter):
        def read(self, pids: object) -> float:
            if threading.current_thread() is not threading.main_thread():
                stuck.set()
                release.wait(20)
            return 1.0

    loop = MeteringLoop(open_meters=lambda monitor: ())
    monitor = loop.monitor(KEY, meters=[Stuck("stuck")])
    try:
        assert stuck.wait(20)
        assert monitor.sample().wall_time is not None
    finally:
        release.set()
        monitor.close()
        loop.stop()


def test_peaks_of_meters_are_unknown_and_totals_split_when_trials_share(
    fake: FakeMetering,
) -> None:
    size, total = FakeMeter("size", 5.0), FakeMeter("total", 0.0, peak=False)
    first = fake.loop.monitor(KEY, meters=[size, total])
    second = fake.loop.monitor(OTHER, meters=[size, total])
    total.value = 8.0
    fake.advance(1.0)
    assert first.close().custom == {"total": 4.0}
    assert second.close().custom == {"total": 4.0}


class LosingMeter:
    """Reads 5 until the resource is lost."""

    eager = True
    period = 0.1

    def __init__(self) -> None:
        self.lost = False

    def read(self, pids: object, *, fully: bool = False) -> dict[str, MeterReading]:
        return {"gpu_memory": MeterReading(None if self.lost else 5.0, peak=True, lost=self.lost)}

    def close(self) -> None:
        pass


def test_a_lost_resource_is_unknown_for_good() -> None:
    meter = LosingMeter()
    clock, tree = FakeClock(), FakeProcessTree()
    loop = MeteringLoop(
        clock=clock, open_tree=lambda pid: tree, open_meters=lambda w: [meter], threaded=False
    )
    monitor = loop.monitor(KEY)
    assert monitor.usage().gpu_memory == 5.0
    for lost in (True, False):
        meter.lost = lost
        clock.advance(1.0)
        loop.tick()
        assert monitor.usage().gpu_memory is None
    monitor.add_usage(Usage(gpu_memory=7.0))
    assert monitor.close().gpu_memory == 7.0


def test_processor_energy_by_share_of_busy_time(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": ("package-0", 1e6), "intel-rapl:0:0": ("core", 9e9)}
    for zone, (name, microjoules) in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules:.0f}")
        (tmp_path / zone / "max_energy_range_uj").write_text("100000000")
    rapl = Rapl(tmp_path)
    busy, used = [0.0], [0.0]
    meter = ProcessorEnergyMeter(
        lambda: used[0], open_counters=lambda: rapl, host_busy=lambda: busy[0]
    )
    assert meter.read([]) == {}
    busy[0], used[0] = 8.0, 2.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("41000000")  # 40 J, a quarter is ours
    assert meter.read([])["energy"].value == pytest.approx(10.0)
    busy[0], used[0] = 9.0, 3.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000")  # wrapped: 60 J, all ours
    assert meter.read([])["energy"].value == pytest.approx(70.0)


def test_without_counters_there_is_no_energy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_warnings()
    meter = ProcessorEnergyMeter(
        lambda: 1.0, is_limited=True, open_counters=lambda: Rapl(tmp_path)
    )
    assert meter.read([]) == {}
    assert meter.period == float("inf")
    assert "A quota on energy counts none of it" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_busy_seconds_of_the_host_leave_out_idle_and_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "stat").write_text("cpu  100 0 50 900 300 10 20 20 5 0\ncpu0 1\n")
    assert host_busy() * os.sysconf("SC_CLK_TCK") == pytest.approx(200)
