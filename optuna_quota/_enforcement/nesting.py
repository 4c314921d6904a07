"""Find quota pruners nested in other pruners, the limits that result, and nested samplers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
import itertools
import math
import types
from typing import Any, cast, Protocol, TypeVar

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial

from optuna_quota import _optuna
from optuna_quota._limits import Limits
from optuna_quota._metering import Meter, TrialMonitor


T = TypeVar("T")

# Bounds of the search, in objects, items of one container, and references from one object to the
# next: pruners are small, but may hold a data set.
_MOST_OBJECTS = 2000
_MOST_ITEMS = 300
_DEPTH = 6
_CONTAINERS = (list, tuple, set, frozenset, deque)


class LimitingPruner(Protocol):
    """The interface of a :class:`~optuna_quota.QuotaPruner`, without importing it."""

    limits: Limits
    interrupt: bool
    meters: tuple[Meter, ...]

    def watch_trial(self, study: Study, trial: BaseTrial | FrozenTrial) -> TrialMonitor:
        """Return the monitor of a running trial."""


def find_nested(root: object, kind: type[T]) -> list[T]:
    """Return the instances of a class that an object is or holds, outer ones first.

    Attributes, containers and closures are searched; studies and storages are not, since what
    they hold belongs to others.
    """
    inside = walk([root], _parts, most=_MOST_OBJECTS, depth=_DEPTH)
    # Not `isinstance`: a proxy may claim another class.
    return [cast("T", each) for each in inside if issubclass(type(each), kind)]


def quota_pruners(pruner: object) -> list[LimitingPruner]:
    """Return the quota pruners that a study's pruner is or holds, outer ones first."""
    inside: list[object] = find_nested(pruner, BasePruner)
    return [cast("LimitingPruner", each) for each in inside if hasattr(type(each), "watch_trial")]


def pruner_limits(pruners: Iterable[LimitingPruner]) -> Limits | None:
    """Return the tightest limits of a study's quota pruners, None without any."""
    found = [each.limits for each in pruners]
    return functools.reduce(lambda a, b: a.tightened(b.amounts()), found) if found else None


def agreed_limits(own: Limits | None, theirs: Limits | None, of: str) -> Limits:
    """Return the limits on each trial where two places may give them.

    A pruner without limits may be there for something else: a deadline, a worker to preempt.

    Raises:
        ValueError: If they disagree; ``of`` names the two places.
    """
    if own is not None and theirs and own != theirs:
        raise ValueError(
            f"The limits of {of} must agree but got {own!r} and {theirs!r}. Give them to "
            "QuotaPruner alone."
        )
    return theirs or own or Limits()


def pruner_meters(pruners: Iterable[LimitingPruner]) -> tuple[Meter, ...]:
    """Return the user's meters of a study's quota pruners, one of each name."""
    meters: dict[str, Meter] = {}
    for each in pruners:
        for meter in each.meters:
            meters.setdefault(meter.name, meter)
    return tuple(meters.values())


def requires_uniform_constraints(sampler: object) -> bool:
    """Return whether a study's sampler raises unless all trials have the same constraints."""
    inside: list[Any] = find_nested(getattr(sampler, "base_sampler", sampler), BaseSampler)
    return any(
        _optuna.demands_uniform_constraints(each) and _optuna.reads_constraints(each)
        for each in inside
    )


def _parts(each: object) -> Iterable[object]:
    held = parts_of(each)
    return _attributes(each) if held is None else held


def _attributes(each: object) -> Iterator[object]:
    cls = type(each)
    is_optunas = cls.__module__.split(".")[0] == "optuna"
    if isinstance(each, (type, types.ModuleType)) or (
        is_optunas and not issubclass(cls, (BasePruner, BaseSampler))
    ):
        return
    # Not `vars`: the class may have its own `__getattribute__`.
    with contextlib.suppress(AttributeError):
        yield from list(object.__getattribute__(each, "__dict__").values())
    for base in cls.__mro__:
        for member in vars(base).values():
            if isinstance(member, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    yield member.__get__(each, cls)


# Objects that an object holds.


def walk(
    roots: Iterable[object],
    parts: Callable[[Any], Iterable[object]],
    *,
    most: int,
    depth: float = math.inf,
) -> Iterator[object]:
    """Yield objects and, recursively, their ``parts``: each once, outer ones first."""
    # Kept alive, so that no other object gets the same id.
    known: dict[int, object] = {}
    waiting = deque((root, 0) for root in roots)
    while waiting and len(known) < most:
        each, at = waiting.popleft()
        if id(each) in known:
            continue
        known[id(each)] = each
        yield each
        if at < depth:
            with contextlib.suppress(Exception):  # methods of a user's class may raise anything
                held = itertools.islice(parts(each), _MOST_ITEMS)
                waiting.extend((part, at + 1) for part in held)


def parts_of(each: Any) -> Iterable[object] | None:
    """Return what a container, function, method or partial holds, None for any other object."""
    if isinstance(each, Mapping):
        return each.values()
    if isinstance(each, _CONTAINERS):
        return each
    if isinstance(each, functools.partial):
        return (each.func, *each.args, *each.keywords.values())
    if isinstance(each, types.MethodType):
        return (each.__self__, each.__func__)
    return _held_by_function(each) if isinstance(each, types.FunctionType) else None


def _held_by_function(function: types.FunctionType) -> Iterator[object]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # empty until its variable is assigned
            yield cell.cell_contents
