"""Which GPUs a process may use: pure, from CUDA's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuIdentity:
    """What CUDA's variables may call a GPU.

    Attributes:
        uuid: Such as ``"GPU-5a1b..."``, empty when unknown.
        model: Its name.
        instances: The UUIDs of the MIG instances that it is cut into, ``"MIG-..."``, an empty one
            where it is unknown; None when it is whole.
    """

    uuid: str
    model: str
    instances: Sequence[str] | None = None


@dataclass(frozen=True)
class Visible:
    """What CUDA shows to a process.

    Attributes:
        parts: GPUs by position, each with the position of a MIG instance or None for the whole
            GPU, which stands for all of its instances; all that may be meant where ``unresolved``.
        unresolved: The entries of ``CUDA_VISIBLE_DEVICES`` when it can't be known which GPUs they
            name.
    """

    parts: tuple[tuple[int, int | None], ...]
    unresolved: tuple[str, ...] = ()


def visible_devices(gpus: Sequence[GpuIdentity], environment: Mapping[str, str]) -> Visible:
    """Return the GPUs that CUDA shows under these environment variables.

    As CUDA does, the list ends at the first entry that names nothing. By number, CUDA counts the
    fastest GPU first unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: where the models differ, only a list
    that names all of them is known to mean these.

    Args:
        gpus: All GPUs, in the order of their PCI bus.
        environment: Such as ``os.environ``.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    everything = tuple((i, None) for i in range(len(gpus)))
    if wanted is None:
        return Visible(everything)
    is_ordered = (
        environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({g.model for g in gpus}) <= 1
    )
    parts: dict[tuple[int, int | None], None] = {}
    entries: dict[str, None] = {}
    is_known = True
    for entry in (text.strip() for text in wanted.split(",")):
        part = _named_by(entry, gpus)
        if part is None and not _may_be_an_instance(entry, gpus):
            break
        entries[entry] = None
        is_known = is_known and part is not None and (is_ordered or not _is_number(entry))
        if part is not None:
            parts[part] = None
    if is_known or set(parts) == set(everything):
        return Visible(tuple(parts))
    return Visible(everything, tuple(entries))


def _named_by(entry: str, gpus: Sequence[GpuIdentity]) -> tuple[int, int | None] | None:
    """Return what an entry names when GPUs are counted by their PCI bus, None for nothing."""
    if _is_number(entry):
        return (int(entry), None) if int(entry) < len(gpus) else None
    found: list[tuple[int, int | None]] = []
    for i, gpu in enumerate(gpus):
        if entry and gpu.uuid.startswith(entry):
            found.append((i, None))
        uuids = gpu.instances or ()
        found += [(i, j) for j, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _may_be_an_instance(entry: str, gpus: Sequence[GpuIdentity]) -> bool:
    return entry.startswith("MIG-") and not all(all(gpu.instances or ()) for gpu in gpus)


def _is_number(entry: str) -> bool:
    return entry.isascii() and entry.isdecimal()
