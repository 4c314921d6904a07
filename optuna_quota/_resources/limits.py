"""Ceilings on one trial."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any

from optuna_quota import _units
from optuna_quota._resources.amounts import Amounts
from optuna_quota._resources.resource import LIMIT_RESOURCES
from optuna_quota._resources.resource import RESOURCES


@dataclass(frozen=True, init=False, repr=False)
class Limits(Amounts):
    """Ceilings on one trial; a trial over any of them is terminated.

    Example:

        .. code-block:: python

            limits = Limits(memory="4GiB", wall_time="5min")

    Args:
        memory: Memory of the trial's whole process tree: bytes, or text with its unit. Anonymous,
            shared (divided among its holders) and swapped out; not what was reserved and never
            touched, nor clean pages of files.
        wall_time: Clock time of the trial: seconds, or text with its unit.
        cpu_time: CPU-seconds of the trial's whole process tree.
        cpu_cores: Cores kept busy, averaged over about a second.
        gpu_memory: GPU memory of the trial's processes summed over all visible GPUs.
        gpu_time: Busy GPU-seconds of the trial's processes.
        custom: Limits on what the user's own meters read, by the name of the meter.

    Raises:
        ValueError: If a value is not positive and finite, has no unit as text, or an unknown one.
        TypeError: If a value is neither a number nor text.
    """

    memory: float | None
    wall_time: float | None
    cpu_time: float | None
    cpu_cores: float | None
    gpu_memory: float | None
    gpu_time: float | None
    custom: Mapping[str, float]

    _fields = LIMIT_RESOURCES

    def __init__(
        self,
        *,
        memory: float | str | None = None,
        wall_time: float | str | None = None,
        cpu_time: float | str | None = None,
        cpu_cores: float | None = None,
        gpu_memory: float | str | None = None,
        gpu_time: float | str | None = None,
        custom: Mapping[str, float] | None = None,
    ) -> None:
        self._set("memory", memory)
        self._set("wall_time", wall_time)
        self._set("cpu_time", cpu_time)
        self._set("cpu_cores", cpu_cores)
        self._set("gpu_memory", gpu_memory)
        self._set("gpu_time", gpu_time)
        object.__setattr__(self, "custom", _custom_amounts(custom, "custom"))

    def amounts(self) -> dict[str, float]:
        """Return what is set, by resource, in SI base units."""
        return {**super().amounts(), **self.custom}

    def tightened(self, left: Mapping[str, float]) -> Limits:
        """Return these limits with each lowered to ``left`` where that is less.

        Args:
            left: What may still be used, by resource, in SI base units; must be positive.
        """
        merged = self.amounts()
        for name, value in left.items():
            merged[name] = min(merged.get(name, math.inf), value)
        return Limits.from_amounts(merged)

    @classmethod
    def from_amounts(cls, amounts: Mapping[str, float]) -> Limits:
        """Return limits from amounts by resource, as :meth:`amounts` gives them."""
        known = {name: value for name, value in amounts.items() if name in cls._fields}
        custom = {name: value for name, value in amounts.items() if name not in cls._fields}
        return cls(**known, custom=custom)

    def _shown(self) -> Iterator[str]:
        yield from super()._shown()
        if self.custom:
            yield f"custom={dict(self.custom)!r}"

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.amounts().items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Limits.from_amounts, (self.amounts(),))


def _custom_amounts(custom: Mapping[str, float] | None, name: str) -> Mapping[str, float]:
    for key in custom or {}:
        if key in RESOURCES or not key.isidentifier():
            raise ValueError(
                f"`{name}` must name meters of your own by identifiers other than "
                f"{', '.join(RESOURCES)} but got {key!r}."
            )
    return {key: _units.parse_number(value, key) for key, value in (custom or {}).items()}
