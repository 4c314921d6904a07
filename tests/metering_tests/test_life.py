"""The loop over its life: many trials, forks, the interpreter's exit; and a meter end to end."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

import optuna
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._metering import check_names
from optuna_quota._metering import metering_loop
from optuna_quota._metering.energy import busy_seconds_of_host
from optuna_quota._metering.energy import ProcessorEnergyMeter
from optuna_quota._metering.energy import Rapl
from optuna_quota.testing import check_meter
from optuna_quota.testing import fake_metering
from optuna_quota.testing import FakeMeter


def test_ten_thousand_trials_leave_nothing_behind() -> None:
    # In a process of its own: threads and descriptors of other tests come and go in this one.
    code = """
import psutil
from optuna_quota import Limits
from optuna_quota._metering import MeteringLoop

loop = MeteringLoop()
process = psutil.Process()

def run(n):
    for i in range(n):
        loop.monitor((0, i), limits=Limits(memory="64GiB")).close()

run(500)
memory, descriptors = process.memory_info().rss, process.num_fds()
threads = process.num_threads()
run(10_000)
assert process.num_fds() == descriptors
assert process.num_threads() == threads
assert process.memory_info().rss - memory < 8 * 2**20
assert loop.find((0, 9_999)) is None
loop.stop()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_loop_of_its_own() -> None:
    code = """
import os, sys
from optuna_quota._metering import metering_loop
watch = metering_loop().monitor((1, 1))
pid = os.fork()
if pid == 0:
    old = watch.close()  # the parent's: let go of, without a hang
    mine = metering_loop()
    assert mine.find((1, 1)) is None
    usage = mine.monitor((1, 2)).close()
    os._exit(0 if usage.memory else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert metering_loop().find((1, 1)) is watch
assert watch.close().memory
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "0"


def test_the_interpreter_ends_while_trials_are_metered() -> None:
    code = """
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota._metering import metering_loop
watch = metering_loop().monitor((1, 1), limits=Limits(wall_time=3600))
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip() == "end"
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr


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
def test_meters_that_can_not_be_used(meters: list[FakeMeter], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"must|name"):
        check_names(meters)


@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "text"])
def test_check_meter_finds_what_is_wrong(value: float) -> None:
    with pytest.raises(AssertionError):
        check_meter(FakeMeter("mine", value))
    check_meter(FakeMeter("mine", 3.0))
    check_meter(FakeMeter("mine", None))


def test_processor_energy_by_share_of_busy_time(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": ("package-0", 1e6), "intel-rapl:0:0": ("core", 9e9)}
    for zone, (name, microjoules) in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules:.0f}")
        (tmp_path / zone / "max_energy_range_uj").write_text("100000000")
    rapl = Rapl(tmp_path)
    busy, used = [0.0], [0.0]
    gauge = ProcessorEnergyMeter(
        lambda: used[0], open_counters=lambda: rapl, host_busy=lambda: busy[0]
    )
    assert gauge.read([]) == {}
    busy[0], used[0] = 8.0, 2.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("41000000")  # 40 J, a quarter is ours
    assert gauge.read([])["energy"].value == pytest.approx(10.0)
    busy[0], used[0] = 9.0, 3.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000")  # wrapped: 60 J, all ours
    assert gauge.read([])["energy"].value == pytest.approx(70.0)


def test_without_counters_there_is_no_energy(tmp_path: Path) -> None:
    gauge = ProcessorEnergyMeter(lambda: 1.0, open_counters=lambda: Rapl(tmp_path))
    assert gauge.read([]) == {}
    assert gauge.period == float("inf")


def test_busy_seconds_of_the_host_leave_out_idle_and_waiting() -> None:
    assert busy_seconds_of_host("cpu  100 0 50 900 300 10 20 20 5 0\ncpu0 1\n", 100) == 2.0


def test_the_process_has_one_loop() -> None:
    assert metering_loop() is metering_loop()
