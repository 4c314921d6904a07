"""Energy of the processors, and a trial's share of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_quota._metering.energy import busy_seconds_of_host, ProcessorEnergyMeter, Rapl


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


def test_without_counters_there_is_no_energy(tmp_path: Path) -> None:
    meter = ProcessorEnergyMeter(lambda: 1.0, open_counters=lambda: Rapl(tmp_path))
    assert meter.read([]) == {}
    assert meter.period == float("inf")


def test_busy_seconds_of_the_host_leave_out_idle_and_waiting() -> None:
    assert busy_seconds_of_host("cpu  100 0 50 900 300 10 20 20 5 0\ncpu0 1\n", 100) == 2.0
