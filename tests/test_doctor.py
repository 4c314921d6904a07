"""What the checks of this host and of a storage find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
import sys
from typing import cast

import optuna
import pytest

from optuna_quota import _doctor
from optuna_quota._doctor import (
    Capacity,
    check_capacity,
    check_cgroup,
    check_gpus,
    check_kernel,
    check_platform,
    check_rapl,
    check_storage,
    check_versions,
    examine_host,
    examine_storage,
    Finding,
    try_cgroup,
    try_rapl,
)
from optuna_quota._metering.nvml import GpuError, NvmlDevice
from tests.metering_tests.conftest import build_nvml, FakeNvml, nvml


__all__ = ["build_nvml", "nvml"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


@pytest.mark.parametrize(
    ("check", "state"),
    [
        ("kernel memory limit", "missing"),
        ("out-of-memory killer", "degraded"),
        ("peak memory", "degraded"),
    ],
)
def test_a_refusal_of_the_kernel_is_explained(check: str, state: str) -> None:
    assert check_kernel(check, None).state == "ok"
    finding = check_kernel(check, "Operation not permitted")
    assert finding.check == check
    assert finding.state == state and "Operation not permitted" in finding.found
    assert finding.degrades and finding.fix


def test_other_platforms_than_linux_are_degraded() -> None:
    assert check_platform("linux").state == "ok"
    assert check_platform("darwin").fix == "Run on Linux."


@linux
def test_the_kernel_is_asked_and_this_process_stays_as_it_is() -> None:
    import resource

    def settings() -> tuple[object, str]:
        score = Path("/proc/self/oom_score_adj").read_text(encoding="ascii")
        return resource.getrlimit(resource.RLIMIT_DATA), score

    before = settings()
    found = states(examine_host())
    assert found["kernel memory limit"] == "ok"
    assert settings() == before


def test_an_interpreter_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    refused = _doctor._try_memory_limit()
    assert refused is not None and "could not be tried" in refused


@linux
def test_a_limit_that_can_not_be_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_TRY_MEMORY_LIMIT", "raise ValueError('not allowed')")
    assert _doctor._try_memory_limit() == "ValueError: not allowed"
    monkeypatch.setattr(_doctor, "_TRY_MEMORY_LIMIT", "")
    assert _doctor._try_memory_limit() == "private memory beyond it is granted"


@linux
def test_a_hard_limit_that_is_too_low_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -d 32768\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    refused = _doctor._try_memory_limit()
    assert refused == f"the hard limit is already down to {2**25} bytes"
    assert check_kernel("kernel memory limit", refused).state != "ok"


OWN, PARENT = Path("/sys/fs/cgroup/me/app"), Path("/sys/fs/cgroup/me")


@pytest.mark.parametrize(
    ("facts", "state", "text"),
    [
        ((OWN, PARENT, None, ("cgroup.kill", "memory.max")), "ok", "its own group in /sys/fs"),
        ((None, None, None, ()), "degraded", "no control group of version 2"),
        ((OWN, None, None, ()), "degraded", f"above {OWN} is delegated"),
        ((OWN, PARENT, "Permission denied", ()), "degraded", "Permission denied"),
        ((OWN, PARENT, None, ("memory.max",)), "degraded", "its own group in /sys/fs"),
    ],
)
def test_control_groups(
    facts: tuple[Path | None, Path | None, str | None, tuple[str, ...]], state: str, text: str
) -> None:
    finding = check_cgroup(*facts)
    assert finding.state == state
    assert text in finding.found
    assert bool(finding.degrades) is bool(finding.fix) is (state != "ok")


def test_a_tried_group_is_removed(tmp_path: Path) -> None:
    assert try_cgroup(tmp_path) == ([], None)
    assert list(tmp_path.iterdir()) == []
    assert try_cgroup(tmp_path / "nowhere") == ((), "No such file or directory")


def test_rapl(tmp_path: Path) -> None:
    assert check_rapl(try_rapl(tmp_path)).state == "missing"
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    texts = {"name": "package-0", "energy_uj": "123", "max_energy_range_uj": "9"}
    for name, text in texts.items():
        (zone / name).write_text(text + "\n", encoding="ascii")
    assert check_rapl(try_rapl(tmp_path)).state == "ok"
    finding = check_rapl(PermissionError(13, "Permission denied"))
    assert finding.state == "degraded" and "chmod" in finding.fix


ROOMY = Capacity(2**36, 2**36, 16, 16, 0, 2**33)


def test_a_roomy_host_is_ok() -> None:
    findings = {finding.check: finding for finding in check_capacity(ROOMY)}
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert findings["memory"].found == "64 GiB."
    assert findings["CPU cores"].found == "16 usable."


def test_the_limits_of_a_container_are_shown() -> None:
    facts = replace(ROOMY, memory_limit=2**33, usable_cores=1.5)
    findings = {finding.check: finding for finding in check_capacity(facts)}
    assert "8 GiB, the container's limit (the host has 64 GiB)" in findings["memory"].found
    assert "1.5 usable of 16" in findings["CPU cores"].found


@pytest.mark.parametrize(
    ("facts", "check"),
    [
        (replace(ROOMY, swap=2**30), "swap"),
        (replace(ROOMY, shared=2**26), "shared memory"),
        (replace(ROOMY, is_overcommit_strict=True), "overcommit"),
    ],
)
def test_conditions_that_make_limits_misleading_are_found(facts: Capacity, check: str) -> None:
    (finding,) = (f for f in check_capacity(facts) if f.state != "ok")
    assert finding.check == check
    assert finding.degrades and finding.fix


class FakeGpu:
    index = 3

    def __init__(self, *, refuses: bool = False, hides: bool = False, mig: bool = False) -> None:
        self.refuses, self.hides, self.mig = refuses, hides, mig

    def name(self) -> str:
        return "NVIDIA H100 80GB HBM3"

    def memory(self) -> tuple[int, int]:
        return 2**20, 80 * 2**30

    def processes(self) -> dict[int, int | None]:
        return {1: None} if self.hides else {}

    def samples(self, since: float) -> list[object]:
        return []

    def joules(self) -> float:
        if self.refuses:
            raise GpuError("the GPU does not support it")
        return 1.0

    def is_partitioned(self) -> bool:
        return self.mig

    def instances(self) -> list[object]:
        return [object(), object()]


@pytest.mark.parametrize(
    ("gpu", "state", "found", "degrades"),
    [
        (FakeGpu(), "ok", "NVIDIA H100 80GB HBM3, 80 GiB.", ""),
        (FakeGpu(mig=True), "ok", "NVIDIA H100 80GB HBM3, 80 GiB, 2 MIG instances.", ""),
        (
            FakeGpu(refuses=True),
            "degraded",
            "NVIDIA H100 80GB HBM3, 80 GiB.",
            "No energy: the GPU does not support it.",
        ),
        (
            FakeGpu(hides=True),
            "degraded",
            "NVIDIA H100 80GB HBM3, 80 GiB.",
            "No gpu_memory of a trial: the driver hides the memory of each process.",
        ),
    ],
)
def test_gpus(gpu: FakeGpu, state: str, found: str, degrades: str) -> None:
    (finding,) = check_gpus([cast("NvmlDevice", gpu)], None)
    assert finding.check == "GPU 3"
    assert (finding.state, finding.found, finding.degrades) == (state, found, degrades)


def test_a_host_without_a_gpu_says_why() -> None:
    (finding,) = check_gpus([], "no NVIDIA driver was found")
    assert finding.state == "missing"
    assert "no NVIDIA driver was found" in finding.found


LIST_GPUS = """
from optuna_quota._doctor import check_gpus, open_devices
for finding in check_gpus(*open_devices()):
    print(f"{finding.check} | {finding.state} | {finding.found} | {finding.degrades}")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("build_nvml")
def test_gpus_of_a_driver(nvml: Callable[..., FakeNvml]) -> None:
    state = "device 0 GPU-0aaa 0 80000000000 1000 5000\ndevice 1 GPU-1aaa 0 40000000000 0 5000\n"
    first, second = nvml().run(LIST_GPUS, state).splitlines()
    assert first.startswith("GPU 0 | ok | ") and "74.5 GiB" in first
    assert second.startswith("GPU 1 | ok | ") and "37.3 GiB" in second
    assert "the NVIDIA driver found no GPU" in nvml().run(LIST_GPUS, "")


@pytest.mark.slow
def test_storages(tmp_path: Path) -> None:
    database = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/tuning.db")
    journal = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "tuning.log"))
    )
    for storage in (database, journal):
        optuna.create_study(storage=storage)
    of_database = states(examine_storage(database))
    assert (of_database["workers"], of_database["dead workers"]) == ("degraded", "ok")
    of_journal = states(examine_storage(journal))
    assert (of_journal["workers"], of_journal["dead workers"]) == ("ok", "degraded")
    database.engine.dispose()


def test_a_slow_storage_is_degraded() -> None:
    (speed, *_) = check_storage(
        "RDBStorage on mysql", 1, 0.3, has_heartbeat=True, is_one_host=False
    )
    assert speed.state == "degraded"
    assert speed.found == "RDBStorage on mysql, 1 study, listed in 300 ms."


def test_a_missing_optional_package_is_degraded() -> None:
    found = {f.check: f for f in check_versions({"optuna": "5.0", "plotly": None})}
    assert found["optuna"].state == "ok"
    assert found["plotly"].state == "degraded"
    assert found["plotly"].fix == "pip install plotly"


def test_this_host_is_examined() -> None:
    findings = examine_host()
    assert {finding.area for finding in findings} == {"stopping", "measuring", "host", "software"}
    checks = [finding.check for finding in findings]
    assert len(checks) == len(set(checks))
    assert all(finding.degrades or finding.state == "ok" for finding in findings)
