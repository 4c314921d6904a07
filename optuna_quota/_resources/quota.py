"""Ceilings on a whole study."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna_quota._resources.amounts import Amounts
from optuna_quota._resources.resource import HELD_RESOURCES
from optuna_quota._resources.resource import nonnegative
from optuna_quota._resources.resource import PRICED_RESOURCES
from optuna_quota._resources.resource import TOTAL_RESOURCES


@dataclass(frozen=True, init=False, repr=False)
class Quota(Amounts):
    """Ceilings on a whole study, across all its workers.

    Example:

        .. code-block:: python

            quota = Quota(wall_time="2h", cpu_time="6h", memory="12GiB")

    Args:
        n_trials: Trials that ran, in total.
        wall_time: Clock time from the first trial to the end of the last; pauses in which a worker
            runs no trial for longer than 10 s don't count.
        trial_time: Sum of the wall times of all trials.
        cpu_time: CPU-seconds in total.
        gpu_time: Busy GPU-seconds in total.
        energy: Joules in total, or text such as ``"2kWh"``.
        cost: Money in total, in the currency of ``prices``.
        memory: What all trials running at one moment on one host may hold together. Each is
            promised its part before it starts, and waits for that: its limit or, once that is
            learned, the upper bound of its footprint; where there is neither, an even share by
            ``Strategy.n_jobs``, else all of it. One that outgrows it is given what is free.
        gpu_memory: Likewise, of GPU memory.
        cpu_cores: Likewise, of CPU cores.
        prices: Price per hour of ``cpu_time``, ``gpu_time`` and ``trial_time``; needed with
            ``cost`` and without a meaning otherwise.

    Raises:
        ValueError: If a value is not positive and finite, has no unit as text, or an unknown one;
            if ``cost`` and ``prices`` don't come together.
        TypeError: If a value is neither a number nor text.
    """

    n_trials: int | None
    wall_time: float | None
    trial_time: float | None
    cpu_time: float | None
    gpu_time: float | None
    energy: float | None
    cost: float | None
    memory: float | None
    gpu_memory: float | None
    cpu_cores: float | None
    prices: Mapping[str, float]

    _fields = TOTAL_RESOURCES + HELD_RESOURCES

    def __init__(
        self,
        *,
        n_trials: int | None = None,
        wall_time: float | str | None = None,
        trial_time: float | str | None = None,
        cpu_time: float | str | None = None,
        gpu_time: float | str | None = None,
        energy: float | str | None = None,
        cost: float | None = None,
        memory: float | str | None = None,
        gpu_memory: float | str | None = None,
        cpu_cores: float | None = None,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        self._set("n_trials", n_trials)
        self._set("wall_time", wall_time)
        self._set("trial_time", trial_time)
        self._set("cpu_time", cpu_time)
        self._set("gpu_time", gpu_time)
        self._set("energy", energy)
        self._set("cost", cost)
        self._set("memory", memory)
        self._set("gpu_memory", gpu_memory)
        self._set("cpu_cores", cpu_cores)
        object.__setattr__(self, "prices", _prices(prices))
        if (self.cost is None) != (not self.prices):
            raise ValueError(
                "`cost` and `prices` must be given together but got "
                f"cost={cost!r}, prices={prices!r}."
            )

    @property
    def totals(self) -> dict[str, float]:
        """What is set of the totals over the study, by resource."""
        return {name: v for name, v in self.amounts().items() if name in TOTAL_RESOURCES}

    @property
    def held(self) -> dict[str, float]:
        """What is set of the ceilings on what runs at one moment on one host, by resource."""
        return {name: v for name, v in self.amounts().items() if name in HELD_RESOURCES}

    def price(self, used: Mapping[str, float | None]) -> float:
        """Return what usage costs: the sum over ``prices`` of price · seconds / 3600.

        Args:
            used: Seconds by resource; what is unknown or missing costs nothing.
        """
        return sum(price * (used.get(name) or 0.0) / 3600 for name, price in self.prices.items())

    def _shown(self) -> Iterator[str]:
        yield from super()._shown()
        if self.prices:
            yield f"prices={dict(self.prices)!r}"

    def __hash__(self) -> int:
        return hash((tuple(self.amounts().items()), tuple(sorted(self.prices.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_build_quota, ({**self.amounts(), "prices": dict(self.prices) or None},))


def _build_quota(arguments: dict[str, Any]) -> Quota:
    return Quota(**arguments)


def _prices(prices: Mapping[str, float] | None) -> Mapping[str, float]:
    for name in prices or {}:
        if name not in PRICED_RESOURCES:
            raise ValueError(
                f"`prices` must be per hour of {', '.join(PRICED_RESOURCES)} but got {name!r}."
            )
    return {
        name: nonnegative(value, f"prices[{name!r}]") for name, value in (prices or {}).items()
    }
