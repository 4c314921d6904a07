"""How much memory and how many cores there are, in containers of either kind and outside.

Which GPUs CUDA shows, by number, UUID and MIG identifier, where the models differ too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from optuna_quota._metering import host
from optuna_quota._metering.host import GpuIdentity, Visible, visible_devices
from tests.metering_tests.conftest import FakeNvml


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


# Which GPUs CUDA shows.

Nvml = Callable[..., FakeNvml]
Part = tuple[int, int | None]

ALIKE = [GpuIdentity("GPU-aa1", "A100"), GpuIdentity("GPU-aa2", "A100")]
MIXED = [GpuIdentity("GPU-aa1", "A100"), GpuIdentity("GPU-bb1", "T4")]
MIG = [GpuIdentity("GPU-aa1", "A100", ["MIG-x1", "MIG-x2"]), GpuIdentity("GPU-aa2", "A100")]
OLD_MIG = [GpuIdentity("GPU-aa1", "A100", [""]), GpuIdentity("GPU-aa2", "A100")]
BOTH: tuple[Part, ...] = ((0, None), (1, None))


@pytest.mark.parametrize(
    ("gpus", "wanted", "parts"),
    [
        (ALIKE, None, BOTH),
        (ALIKE, "0", ((0, None),)),
        (ALIKE, " 1 , 0 ", ((1, None), (0, None))),
        (ALIKE, "1,1", ((1, None),)),
        (ALIKE, "0,7,1", ((0, None),)),
        (ALIKE, "-1", ()),
        (ALIKE, "0,-1,1", ((0, None),)),
        (ALIKE, "", ()),
        (ALIKE, "NoDevFiles", ()),
        (ALIKE, "²", ()),
        (ALIKE, "GPU-aa2", ((1, None),)),
        (ALIKE, "GPU-aa", ()),
        (ALIKE, "0,GPU-aa2", BOTH),
        (MIXED, "GPU-bb", ((1, None),)),
        (MIXED, "0,1", BOTH),
        (MIXED, "1,0", BOTH),
        (MIG, "MIG-x2", ((0, 1),)),
        (MIG, "MIG-x2,MIG-x1", ((0, 1), (0, 0))),
        (MIG, "MIG-other", ()),
        (MIG, "GPU-aa1", ((0, None),)),
        (MIG, "1", ((1, None),)),
    ],
)
def test_resolved_devices(
    gpus: list[GpuIdentity], wanted: str | None, parts: tuple[Part, ...]
) -> None:
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    found = visible_devices(gpus, environment)
    assert set(found.parts) == set(parts)
    assert found.unresolved == ()


@pytest.mark.parametrize(
    ("gpus", "wanted", "entries"),
    [(MIXED, "0", ("0",)), (MIXED, "1", ("1",)), (OLD_MIG, "MIG-GPU-aa1/1/0", None)],
)
def test_ambiguous_entries_stay_unresolved(
    gpus: list[GpuIdentity], wanted: str, entries: tuple[str, ...] | None
) -> None:
    found = visible_devices(gpus, {"CUDA_VISIBLE_DEVICES": wanted})
    assert found == Visible(BOTH, entries or (wanted,))


def test_numbers_in_bus_order_are_resolved_with_different_models() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_devices(MIXED, environment) == Visible(((1, None),))


@pytest.mark.parametrize(
    ("wanted", "order", "parts"),
    [
        ("0", ["GPU-bb1", "GPU-aa1"], ((1, None),)),
        ("1,0", ["GPU-bb1", "GPU-aa1"], BOTH),
        ("1", ["GPU-bb1", "GPU-aa1"], ((0, None),)),
        ("1", ["GPU-aa1", "GPU-bb1"], ((1, None),)),
    ],
)
def test_numbers_with_different_models_are_cudas_own(
    wanted: str, order: list[str], parts: tuple[Part, ...]
) -> None:
    found = visible_devices(MIXED, {"CUDA_VISIBLE_DEVICES": wanted}, order)
    assert found.unresolved == ()
    assert set(found.parts) == set(parts)


def test_an_order_of_other_gpus_is_of_no_use() -> None:
    found = visible_devices(MIXED, {"CUDA_VISIBLE_DEVICES": "1"}, ["GPU-cc1", "GPU-aa1"])
    assert found.unresolved == ("1",)


GB = 1_000_000_000
MIG_STATE = f"""
device 0 GPU-a 1 {40 * GB} 0 0
device 1 GPU-b 0 {24 * GB} 0 0
device 100 MIG-one 0 {5 * GB} 0 0
device 101 MIG-two 0 {10 * GB} 0 0
instance 0 0
instance 0 1
"""
MIXED_STATE = f"device 0 GPU-a 0 {24 * GB} 0 0\ndevice 1 GPU-b 0 {80 * GB} 0 0\n"
ASK = """
from optuna_quota._metering.host import device_memory, gpus_here
print(*(f"{gpu.uuid}={gpu.memory:.0f}" for gpu in gpus_here()), sep=",")
print(device_memory(os.environ))
"""


@pytest.mark.parametrize(
    ("state", "environment", "gpus", "memory"),
    [
        (MIG_STATE, {"CUDA_VISIBLE_DEVICES": "MIG-two"}, f"MIG-two={10 * GB}", 10.0 * GB),
        (
            MIG_STATE,
            {"CUDA_VISIBLE_DEVICES": "GPU-a"},
            f"MIG-one={5 * GB},MIG-two={10 * GB}",
            5.0 * GB,
        ),
        (MIG_STATE, {"CUDA_VISIBLE_DEVICES": "GPU-b"}, f"GPU-b={24 * GB}", 24.0 * GB),
        (MIXED_STATE, {"CUDA_VISIBLE_DEVICES": "1"}, f"1={24 * GB}", None),
        (MIXED_STATE, {"CUDA_VISIBLE_DEVICES": "GPU-b"}, f"GPU-b={80 * GB}", 80.0 * GB),
        (
            MIXED_STATE,
            {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            f"GPU-b={80 * GB}",
            80.0 * GB,
        ),
        (MIXED_STATE, {}, f"GPU-a={24 * GB},GPU-b={80 * GB}", 24.0 * GB),
        (MIXED_STATE + "lost 0\n", {}, f"GPU-b={80 * GB}", 80.0 * GB),
    ],
)
def test_assignable_gpus_and_their_memory(
    nvml: Nvml, state: str, environment: dict[str, str], gpus: str, memory: float | None
) -> None:
    mixed = {"FAKE_NVML_MIXED": "1"} if state.startswith(MIXED_STATE) else {}
    out = nvml().run(ASK, state, **environment, **mixed)
    figures = [line for line in out.splitlines() if not line.startswith("WARNING")]
    assert figures == [gpus, str(memory)]
    warned = [line for line in out.splitlines() if line.startswith("WARNING")]
    assert len(warned) == (memory is None)
    assert all("CUDA_DEVICE_ORDER=PCI_BUS_ID" in line for line in warned)


def test_a_worker_without_a_driver_assigns_no_gpu(nvml: Nvml) -> None:
    out = nvml().run(ASK, has_driver=False)
    assert (
        "WARNING Trials are not assigned GPUs of their own, and see all: no NVIDIA driver" in out
    )


def test_cuda_is_asked_for_its_order_of_different_models(nvml: Nvml) -> None:
    # CUDA's order is the reverse of the bus's in the fake.
    uuids = ["GPU-" + "-".join(letter * n for n in (8, 4, 4, 4, 12)) for letter in "ab"]
    state = "".join(f"device {i} {uuid} 0 {(i + 1) * GB} 0 0\n" for i, uuid in enumerate(uuids))
    out = nvml("-DWITH_CUDA").run(ASK, state, FAKE_NVML_MIXED="1", CUDA_VISIBLE_DEVICES="0")
    assert out.splitlines() == [f"{uuids[1]}={2 * GB}", str(2.0 * GB)]
