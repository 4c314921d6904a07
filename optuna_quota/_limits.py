"""Ceilings and plans as users state them: limits on a trial, the quota of a study, its strategy.

All values are frozen, validated once at construction, comparable, hashable, and can be pickled.
Numbers are SI base units: bytes, seconds, joules.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from dataclasses import dataclass, field
import math
from numbers import Real
from typing import Any, Literal, TYPE_CHECKING

from optuna_quota import _units
from optuna_quota._resources import (
    get_resource,
    HELD_RESOURCES,
    LIMIT_RESOURCES,
    PRICED_RESOURCES,
    RESOURCES,
    TOTAL_RESOURCES,
)
from optuna_quota._units import check_mapping, COUNT, Duration, NUMBER


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Amounts:
    """Amounts by resource: the common part of limits, quotas and usage."""

    _fields: tuple[str, ...] = ()
    # The attribute with a mapping of other names.
    _others = "custom"

    def _set(self, **amounts: Any) -> None:
        for name, value in amounts.items():
            parsed = None if value is None else RESOURCES[name].unit.parse(value, name)
            object.__setattr__(self, name, parsed)

    def amounts(self) -> dict[str, float]:
        """Return what is set, by resource, in SI base units."""
        values = ((name, getattr(self, name)) for name in self._fields)
        known = {name: value for name, value in values if value is not None}
        return {**known, **getattr(self, "custom", {})}

    def __repr__(self) -> str:
        shown = []
        for name in self._fields:
            value = getattr(self, name)
            if value is not None:
                is_auto = isinstance(value, str)
                value = value if is_auto else RESOURCES[name].unit.compact(value)
                shown.append(f"{name}={value!r}")
        others = getattr(self, self._others)
        shown += [f"{self._others}={dict(others)!r}"] if others else []
        return f"{type(self).__name__}({', '.join(shown)})"


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
        wall_time: Clock time of the trial: seconds, text with its unit (``"1h30min"``,
            ``"01:30:00"``) or a timedelta.
        cpu_time: CPU-seconds of the trial's whole process tree.
        cpu_cores: Cores kept busy. An isolated trial is confined to them: it runs on as many
            processors, the thread pools of libraries are as large, and there is no breach. In
            process it is a ceiling on the average over about a second. ``"auto"`` is what the
            worker may use divided by the ``n_jobs`` of the strategy or of ``optimize``.
        gpu_memory: GPU memory of the trial's processes summed over all visible GPUs.
        gpu_time: Busy GPU-seconds of the trial's processes.
        custom: Limits on what the user's own meters read, by the name of the meter.

    Raises:
        ValueError: If a value is not positive and finite, has no unit as text, or an unknown one;
            if a size is a bare number too small to be bytes, such as 4.
        TypeError: If a value is neither a number nor text, nor for a time a timedelta.
    """

    memory: float | None
    wall_time: float | None
    cpu_time: float | None
    cpu_cores: float | Literal["auto"] | None
    gpu_memory: float | None
    gpu_time: float | None
    custom: Mapping[str, float]

    _fields = LIMIT_RESOURCES

    def __init__(
        self,
        *,
        memory: float | str | None = None,
        wall_time: Duration | None = None,
        cpu_time: Duration | None = None,
        cpu_cores: float | Literal["auto"] | None = None,
        gpu_memory: float | str | None = None,
        gpu_time: Duration | None = None,
        custom: Mapping[str, float] | None = None,
    ) -> None:
        _units.check_bare_sizes(memory=memory, gpu_memory=gpu_memory)
        self._set(memory=memory, wall_time=wall_time, cpu_time=cpu_time)
        self._set(gpu_memory=gpu_memory, gpu_time=gpu_time)
        if isinstance(cpu_cores, str) and cpu_cores == "auto":
            object.__setattr__(self, "cpu_cores", cpu_cores)
        else:
            self._set(cpu_cores=cpu_cores)
        object.__setattr__(self, "custom", _custom_limits({} if custom is None else custom))

    def amounts(self) -> dict[str, float]:
        """Return what is set, by resource, in SI base units; ``"auto"`` is no amount yet."""
        amounts = super().amounts()
        if self.cpu_cores == "auto":
            del amounts["cpu_cores"]
        return amounts

    def __bool__(self) -> bool:
        return self.cpu_cores is not None or bool(self.amounts())

    def tightened(self, left: Mapping[str, float]) -> Limits:
        """Return these limits with each lowered to ``left`` where that is less.

        Args:
            left: What may still be used, by resource, in SI base units; must be positive.
        """
        merged = self.amounts()
        for name, value in left.items():
            merged[name] = min(merged.get(name, math.inf), value)
        return _build_limits(merged, merged.get("cpu_cores", self.cpu_cores))

    @classmethod
    def from_amounts(cls, amounts: Mapping[str, float]) -> Limits:
        """Return limits from amounts by resource, as :meth:`amounts` gives them."""
        return _build_limits(amounts, amounts.get("cpu_cores"))

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.amounts().items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_build_limits, (self.amounts(), self.cpu_cores))


def with_cores(limits: Limits, cpu_cores: float | Literal["auto"] | None) -> Limits:
    """Return limits with another one on cores in place of ``"auto"``."""
    if limits.cpu_cores != "auto" or cpu_cores is None:
        return limits
    return _build_limits(limits.amounts(), cpu_cores)


def _build_limits(
    amounts: Mapping[str, float], cpu_cores: float | Literal["auto"] | None
) -> Limits:
    known, custom = split_custom(amounts, LIMIT_RESOURCES)
    limits = Limits(cpu_cores=cpu_cores, custom=custom)
    # What is left of a quota may be less than anyone would type.
    limits._set(**{name: known.get(name) for name in LIMIT_RESOURCES if name != "cpu_cores"})
    return limits


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
        gpu_memory: The same for GPU memory.
        cpu_cores: The same for CPU cores.
        prices: Price per hour of ``cpu_time``, ``gpu_time`` and ``trial_time``; needed with
            ``cost`` and without a meaning otherwise.

    Raises:
        ValueError: If a value is not positive and finite, has no unit as text, or an unknown one;
            if ``cost`` and ``prices`` don't come together; if a size is a bare number that can't
            be meant in bytes, such as 4.
        TypeError: If a value is neither a number nor text, nor for a time a timedelta.
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
    _others = "prices"

    def __init__(
        self,
        *,
        n_trials: int | None = None,
        wall_time: Duration | None = None,
        trial_time: Duration | None = None,
        cpu_time: Duration | None = None,
        gpu_time: Duration | None = None,
        energy: float | str | None = None,
        cost: float | None = None,
        memory: float | str | None = None,
        gpu_memory: float | str | None = None,
        cpu_cores: float | None = None,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        _units.check_bare_sizes(memory=memory, gpu_memory=gpu_memory)
        self._set(n_trials=n_trials, wall_time=wall_time, trial_time=trial_time)
        self._set(cpu_time=cpu_time, gpu_time=gpu_time, energy=energy, cost=cost)
        self._set(memory=memory, gpu_memory=gpu_memory, cpu_cores=cpu_cores)
        object.__setattr__(self, "prices", _prices({} if prices is None else prices))
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

    def __bool__(self) -> bool:
        return bool(self.amounts())

    def __hash__(self) -> int:
        return hash((tuple(self.amounts().items()), tuple(sorted(self.prices.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return (quota_from_amounts, (self.amounts(), dict(self.prices)))


def quota_from_amounts(amounts: Mapping[str, float], prices: Mapping[str, float]) -> Quota:
    """Return a quota from amounts by resource, as :meth:`Quota.amounts` gives them."""
    quota = Quota(cost=amounts.get("cost"), prices=prices)
    quota._set(**amounts)
    return quota


@dataclass(frozen=True)
class Strategy:
    """What a study is about to do.

    Example:

        .. code-block:: python

            strategy = Strategy(n_trials=200, n_jobs=2)

    Args:
        n_trials: Trials to run.
        n_jobs: Trials that run at once, over all workers.
        search_space: Distribution of each hyperparameter. Without it, the points of the strategy
            are those that the footprint or the finished trials know.

    Raises:
        ValueError: If a count is not a positive whole number.
        TypeError: If a count is not a number or the search space not a mapping of distributions.
    """

    n_trials: int
    n_jobs: int = field(default=1, kw_only=True)
    search_space: Mapping[str, BaseDistribution] | None = field(
        default=None, kw_only=True, hash=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_trials", COUNT.parse(self.n_trials, "n_trials"))
        object.__setattr__(self, "n_jobs", COUNT.parse(self.n_jobs, "n_jobs"))
        if self.search_space is not None:
            object.__setattr__(self, "search_space", _search_space(self.search_space))


def split_custom(
    amounts: Mapping[str, float], names: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the amounts of the resources in ``names``, and those of the user's own meters."""
    known = {name: value for name, value in amounts.items() if name in names}
    return known, {name: value for name, value in amounts.items() if name not in names}


def _custom_limits(custom: Mapping[str, float]) -> Mapping[str, float]:
    check_mapping(custom, "custom", "names of meters to numbers")
    for key in custom:
        if key in RESOURCES or not key.isidentifier():
            raise ValueError(
                "`custom` must name meters of your own by identifiers other than "
                f"{', '.join(RESOURCES)} but got {key!r}."
            )
    return {key: NUMBER.parse(value, key) for key, value in custom.items()}


def _prices(prices: Mapping[str, float]) -> Mapping[str, float]:
    check_mapping(prices, "prices", "names of resources to prices per hour")
    for name in prices:
        if name not in PRICED_RESOURCES:
            raise ValueError(
                f"`prices` must be per hour of {', '.join(PRICED_RESOURCES)} but got {name!r}."
            )
    return {name: nonnegative(value, f"prices[{name!r}]") for name, value in prices.items()}


def _search_space(space: Any) -> dict[str, BaseDistribution]:
    from optuna.distributions import BaseDistribution

    if not isinstance(space, Mapping):
        raise TypeError(
            f"`search_space` must be a mapping of names to distributions but got {space!r}."
        )
    for name, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"`search_space[{name!r}]` must be an Optuna distribution "
                f"but got {distribution!r}."
            )
    return dict(space)


def nonnegative(value: Any, name: str) -> float:
    is_number = hasattr(value, "__float__") and type(value).__name__ not in ("bool", "bool_")
    if is_number and not isinstance(value, Real):
        with contextlib.suppress(TypeError, ValueError):  # an array of several elements
            value = float(value)
    return get_resource(name).unit.parse(value, name, zero=True)
