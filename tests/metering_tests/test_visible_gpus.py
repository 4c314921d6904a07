"""Which GPUs CUDA shows, by number, UUID and MIG identifier, where the models differ too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from optuna_quota._metering.visible_gpus import GpuIdentity, Visible, visible_devices
from tests.metering_tests.conftest import FakeNvml


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
from optuna_quota._ledger.gpus import gpus_here
from optuna_quota._metering.visible_gpus import device_memory
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
