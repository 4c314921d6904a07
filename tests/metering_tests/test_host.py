"""How much memory and how many cores there are, in containers of either kind and outside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from optuna_quota._metering import host


GIB = 2**30


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 16 GiB."""
    found = SimpleNamespace(total=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 16 * GIB),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": "max\n"}, 16 * GIB),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        # An ancestor's limit binds as well.
        (
            {
                **V2,
                "sys/fs/cgroup/a/b/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/a/memory.max": f"{3 * GIB}\n",
            },
            3 * GIB,
        ),
        # In a cgroup namespace the mount's top is the container's own cgroup.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
        # More than there is limits nothing.
        ({**V2, "sys/fs/cgroup/a/b/memory.max": f"{99 * GIB}\n"}, 16 * GIB),
        ({**V1, "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (
            {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
            16 * GIB,
        ),
        # Mixed: version 1 controllers beside an empty version 2 tree.
        (
            {
                **V1,
                "sys/fs/cgroup/unified/cgroup.procs": "",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            },
            2 * GIB,
        ),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": "what is this\n"}, 16 * GIB),
    ],
)
@pytest.mark.usefixtures("memory")
def test_memory_limit(tmp_path: Path, files: dict[str, str], limit: float) -> None:
    assert host.host_memory_limit(make(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("cores", "quotas", "expected"),
    [
        (8, [], 8),
        (8, ["max 100000"], 8),
        (8, ["150000 100000"], 1.5),
        (2, ["800000 100000"], 2),
        (8, ["400000 100000", "200000 100000"], 2),
        (8, ["-1 100000"], 8),
        (8, ["", " ", "1 0"], 8),
    ],
)
def test_usable_cores(cores: float, quotas: list[str], expected: float) -> None:
    assert host.usable_cores(cores, quotas) == expected


@pytest.mark.parametrize(
    "files",
    [
        {**V2, "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"},
        {
            **V1,
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_cpu_count_heeds_quotas(tmp_path: Path, files: dict[str, str]) -> None:
    assert host.cpu_count(make(tmp_path, files)) == 0.5


def test_this_host() -> None:
    assert 0 < host.host_memory_limit() <= psutil.virtual_memory().total
    assert 0 < host.cpu_count() <= psutil.cpu_count()
