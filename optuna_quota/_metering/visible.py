"""Which GPUs a process may use: pure, from CUDA's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence


def visible_devices(
    uuids: Sequence[str], names: Sequence[str], environment: Mapping[str, str]
) -> list[int]:
    """Return the positions of the devices that CUDA shows, in NVML's order.

    As CUDA does, the list ends at the first entry that names nothing. By number, CUDA counts the
    fastest device first unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, and NVML by bus: where the models
    differ the numbers can't be mapped, and all devices are returned. That does no harm: a process
    holds nothing on a device that it does not see.

    Args:
        uuids: Identifier of each device, such as ``"GPU-5a1b..."``.
        names: Model of each device.
        environment: Such as ``os.environ``.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    everything = list(range(len(uuids)))
    if wanted is None:
        return everything
    entries = [entry.strip() for entry in wanted.split(",")]
    by_bus = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(set(names)) <= 1
    if not by_bus and any(entry.isdigit() for entry in entries):
        return everything
    # An instance is named by an identifier of its own, from which its device can't be told.
    if any(entry.startswith("MIG-") for entry in entries):
        return everything
    found: list[int] = []
    for entry in entries:
        position = _position(entry, uuids)
        if position is None:
            break
        if position not in found:
            found.append(position)
    return found


def _position(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isdigit():
        return int(entry) if int(entry) < len(uuids) else None
    matches = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None
