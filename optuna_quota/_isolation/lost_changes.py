"""Finds what a trial changed of its script's variables: in the study's process, it is lost.

In process, an objective may append to a list or remember the best model. In a trial's process it
does so to a copy, without an error: the user has to be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import contextlib
from dataclasses import dataclass
import functools
import sys
import types
from typing import Any

from optuna_quota._isolation.modules import closure_variables, is_installed, user_modules


# Going through all items of a script's data would take time, and copy the pages of a fork.
_MAX_ITEMS = 100
_MAX_ALL_ITEMS = 2_000
_PLAIN = {bool, int, float, complex, str, type(None)}
_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True)
class _Namespace:
    """Variables as they were before the objective was called.

    Objects are known by their id: a reference would keep what the objective frees.
    """

    owner: str  # The class of the object whose attributes they are, else ""
    read: Callable[[], dict[str, Any]]
    marks: dict[str, Any]
    items: dict[str, list[Any]]  # The marks of what small containers hold


Variables = list[_Namespace]


def read_variables(objective: Any) -> Variables:
    """Return the variables of a script: globals, those of closures, attributes of its objects."""
    found: Variables = []
    own = {"__main__", *(module.__name__ for module in user_modules())}
    todo = deque([objective, sys.modules["__main__"], *user_modules()])
    seen: set[int] = set()
    left = _MAX_ALL_ITEMS
    while todo:
        value = todo.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        # A user's class may raise anything.
        with contextlib.suppress(Exception):
            todo += _callees(value)
            for owner, key, read in _namespaces(value, own):
                if key in seen:
                    continue
                seen.add(key)
                values, items = read(), {}
                for name, held in values.items():
                    if type(held) in _CONTAINERS and len(held) <= min(left, _MAX_ITEMS):
                        items[name] = _item_marks(held)
                        left -= len(held)
                marks = {name: _mark(held) for name, held in values.items()}
                found.append(_Namespace(owner, read, marks, items))
                # Attributes of attributes are many, and rarely results.
                todo += [] if owner else [v for v in values.values() if type(v) not in _PLAIN]
    return found


def changed_variables(variables: Variables) -> tuple[str, ...]:
    """Return the names of variables that are no longer as they were read."""
    return tuple(dict.fromkeys(name for each in variables for name in _changed(each)))


def describe_lost_changes(number: int, names: Iterable[str]) -> str:
    """Return the warning about variables that a trial changed."""
    *first, last = [f"`{name}`" for name in names]
    listed = f"{', '.join(first)} and {last}" if first else last
    return (
        f"Trial {number} changed {listed} of the script. What an isolated trial changes stays in "
        "its process: neither the script nor the next trial sees it. To keep a result, return it, "
        "or store it by `trial.set_user_attr` or in a file."
    )


def _callees(value: Any) -> Iterable[Any]:
    if type(value) is types.MethodType:
        return value.__self__, value.__func__
    if type(value) is functools.partial:
        return value.func, *value.args, *value.keywords.values()
    return ()


def _namespaces(
    value: Any, own: set[str]
) -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    """Yield the owner, an id and a reader of each namespace that belongs to a value.

    By its type alone, as a lazy object would load what it stands for if it was asked.
    """
    kind = type(value)
    if kind is types.ModuleType:
        if value.__name__ in own:
            yield "", id(vars(value)), functools.partial(_public, vars(value))
    elif kind is types.FunctionType:
        if not is_installed(value.__code__.co_filename):
            # Not those of its module where it was sent by value.
            names = value.__globals__
            yield "", id(names), functools.partial(_public, names)
            if value.__closure__:
                yield "", id(value.__closure__), functools.partial(closure_variables, value)
    elif kind.__module__ in own and not issubclass(kind, type):
        names = object.__getattribute__(value, "__dict__")
        yield kind.__name__, id(names), functools.partial(_public, names)


def _public(names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.copy().items() if not name.startswith("_")}


def _mark(value: Any) -> Any:
    return (type(value), value) if type(value) in _PLAIN else id(value)


def _item_marks(container: Any) -> list[Any]:
    items = [*container, *container.values()] if isinstance(container, dict) else container
    return [_mark(item) for item in items]


def _changed(before: _Namespace) -> Iterator[str]:
    prefix = f"{before.owner}." if before.owner else ""
    for name, value in before.read().items():
        if _is_changed(before, name, value):
            yield prefix + name


def _is_changed(before: _Namespace, name: str, value: Any) -> bool:
    former, present = before.marks.get(name), _mark(value)
    if present == former:
        return name in before.items and before.items[name] != _item_marks(value)
    if before.owner:
        # A model or the trial itself as an attribute is there for other methods. What changes
        # from a number to another may be a result.
        return isinstance(former, tuple) and isinstance(present, tuple)
    return not issubclass(type(value), _CODE)
