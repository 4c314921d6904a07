"""Each fact becomes a finding that says what is lost and how to mend it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from optuna_quota._doctor import examine_host
from optuna_quota._doctor import examine_storage
from optuna_quota._doctor.attempts import ATTEMPTS
from optuna_quota._doctor.cgroups import CgroupFacts
from optuna_quota._doctor.cgroups import judge_cgroup
from optuna_quota._doctor.cgroups import try_group
from optuna_quota._doctor.finding import Finding
from optuna_quota._doctor.gpus import judge_gpus
from optuna_quota._doctor.gpus import read_gpu
from optuna_quota._doctor.host import HostFacts
from optuna_quota._doctor.host import judge_host
from optuna_quota._doctor.measuring import judge_processes
from optuna_quota._doctor.measuring import judge_rapl
from optuna_quota._doctor.measuring import try_rapl
from optuna_quota._doctor.software import judge_versions
from optuna_quota._doctor.software import read_versions
from optuna_quota._doctor.stopping import judge_stopping
from optuna_quota._doctor.storage import judge_storage
from optuna_quota._doctor.storage import StorageFacts
from optuna_quota._metering.nvml import GpuError


ALL_WORK: dict[str, str | None] = dict.fromkeys(ATTEMPTS)
ALL_FAIL: dict[str, str | None] = dict.fromkeys(ATTEMPTS, "Operation not permitted")
DELEGATED = CgroupFacts(
    "/sys/fs/cgroup/me/app",
    "/sys/fs/cgroup/me",
    None,
    ("cgroup.kill", "memory.max"),
)


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def test_a_host_that_can_do_all_is_ok() -> None:
    findings = judge_stopping(ALL_WORK, DELEGATED, ("fork", "spawn", "forkserver"))
    assert set(states(findings).values()) == {"ok"}
    assert set(states(judge_processes(ALL_WORK)).values()) == {"ok"}


def test_a_host_that_can_do_nothing_says_what_that_costs() -> None:
    findings = [
        *judge_stopping(ALL_FAIL, CgroupFacts(), ("spawn",)),
        *judge_processes(ALL_FAIL),
    ]
    assert "ok" not in states(findings).values()
    assert all(finding.degrades and finding.fix for finding in findings)
    assert states(findings)["kernel memory limit"] == "missing"
    assert states(findings)["out-of-memory killer"] == "degraded"
    assert any("Operation not permitted" in finding.found for finding in findings)


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        (DELEGATED, "ok", "its own group in /sys/fs/cgroup/me"),
        (CgroupFacts(), "degraded", "no control group of version 2"),
        (CgroupFacts("/g/x"), "degraded", "/g/x lets nobody limit memory"),
        (CgroupFacts("/g/x", "/g", "Permission denied"), "degraded", "Permission denied"),
        (CgroupFacts("/g/x", "/g", None, ("memory.max",)), "degraded", "its own group in /g"),
    ],
)
def test_control_groups(facts: CgroupFacts, state: str, says: str) -> None:
    finding = judge_cgroup(facts)
    assert finding.state == state
    assert says in finding.found
    assert bool(finding.degrades) is bool(finding.fix) is (state != "ok")


def test_a_group_that_is_tried_is_removed_again(tmp_path: Path) -> None:
    assert try_group(tmp_path) == ((), None)
    assert list(tmp_path.iterdir()) == []
    assert try_group(tmp_path / "nowhere") == ((), "No such file or directory")


def test_rapl_is_read_where_it_is(tmp_path: Path) -> None:
    assert judge_rapl(try_rapl(tmp_path)).state == "missing"
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in {
        "name": "package-0",
        "energy_uj": "123",
        "max_energy_range_uj": "9",
    }.items():
        (zone / name).write_text(text + "\n", encoding="ascii")
    assert judge_rapl(try_rapl(tmp_path)).state == "ok"


def test_rapl_that_may_not_be_read_says_how_to_allow_it() -> None:
    finding = judge_rapl(PermissionError(13, "Permission denied"))
    assert finding.state == "degraded"
    assert "chmod" in finding.fix


ROOMY = HostFacts(2**36, 2**36, 2**35, 16, 16, 0, 2**33, "0")


def test_a_roomy_host_is_ok() -> None:
    findings = {finding.check: finding for finding in judge_host(ROOMY)}
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert findings["memory"].found == "64 GiB; 32 GiB available now."
    assert findings["CPU cores"].found == "16 usable."


def test_the_containers_limits_are_told() -> None:
    facts = replace(ROOMY, memory_limit=2**33, usable_cores=1.5)
    findings = {finding.check: finding for finding in judge_host(facts)}
    assert "8 GiB, the container's limit (the host has 64 GiB)" in findings["memory"].found
    assert "1.5 usable of 16" in findings["CPU cores"].found


@pytest.mark.parametrize(
    ("facts", "check"),
    [
        (replace(ROOMY, swap=2**30), "swap"),
        (replace(ROOMY, shared=2**26), "shared memory"),
        (replace(ROOMY, overcommit="2"), "overcommit"),
    ],
)
def test_what_misleads_is_told(facts: HostFacts, check: str) -> None:
    (finding,) = (f for f in judge_host(facts) if f.state != "ok")
    assert finding.check == check
    assert finding.degrades and finding.fix


class FakeGpu:
    index = 3

    def __init__(self, *, refuses: bool = False, hides: bool = False, cut: bool = False) -> None:
        self.refuses, self.hides, self.cut = refuses, hides, cut

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
        return self.cut

    def instances(self) -> list[object]:
        return [object(), object()]


@pytest.mark.parametrize(
    ("gpu", "state", "found", "degrades"),
    [
        (FakeGpu(), "ok", "NVIDIA H100 80GB HBM3, 80 GiB.", ""),
        (FakeGpu(cut=True), "ok", "NVIDIA H100 80GB HBM3, 80 GiB, cut into 2 MIG instances.", ""),
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
            "No gpu_memory of a trial: the driver hides what each process holds.",
        ),
    ],
)
def test_gpus(gpu: FakeGpu, state: str, found: str, degrades: str) -> None:
    (finding,) = judge_gpus([read_gpu(gpu)], None)
    assert finding.check == "GPU 3"
    assert (finding.state, finding.found, finding.degrades) == (state, found, degrades)


def test_no_gpu_is_told_with_its_reason() -> None:
    (finding,) = judge_gpus([], "no NVIDIA driver was found")
    assert finding.state == "missing"
    assert "no NVIDIA driver was found" in finding.found


def test_storages(tmp_path: Path) -> None:
    database = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/tuning.db")
    journal = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "tuning.log"))
    )
    for storage in (database, journal):
        optuna.create_study(storage=storage)
    of_database = states(examine_storage(database))
    assert of_database["workers"] == "degraded"  # SQLite is for one host
    assert of_database["dead workers"] == "ok"
    of_journal = states(examine_storage(journal))
    assert of_journal["workers"] == "ok"
    assert of_journal["dead workers"] == "degraded"
    database.engine.dispose()


def test_a_slow_storage_is_told() -> None:
    (answers, *_) = judge_storage(StorageFacts("RDBStorage on mysql", 1, 0.3, True, False))
    assert answers.state == "degraded"
    assert answers.found == "RDBStorage on mysql, 1 study, listed in 300 ms."


def test_versions() -> None:
    found = {finding.check: finding for finding in judge_versions(read_versions())}
    assert found["optuna"].state == "ok"
    lacking = {**read_versions(), "plotly": None, "psutil": None}
    states_without = states(judge_versions(lacking))
    assert states_without["plotly"] == "degraded"
    assert states_without["psutil"] == "missing"


def test_the_real_host_is_examined() -> None:
    findings = examine_host()
    assert {"stopping", "measuring", "software"} <= {finding.area for finding in findings}
    checks = [finding.check for finding in findings]
    assert len(checks) == len(set(checks))
    assert all(finding.degrades or finding.state == "ok" for finding in findings)
