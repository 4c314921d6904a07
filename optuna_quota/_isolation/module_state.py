"""What a script has changed in its own modules: configuration that its trials are to find.

Modules are imported anew in a trial's process. A script that has set ``config.SCALE = 10`` or
``Config.epochs = 3`` means its trials as well.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import functools
import operator
import pickle
import sys
import types
from typing import Any

import cloudpickle


# Objects of a larger pickle are data, which the module loads itself.
_LARGEST = 1 << 14
_MOST_ITEMS = 200

ModuleState = Mapping[str, Mapping[str, Any]]


def is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a value is made of numbers, texts and small containers of them."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    if depth == 0 or type(value) not in (list, tuple, set, frozenset, dict):
        return False
    if len(value) > _MOST_ITEMS:
        return False
    parts = [*value, *value.values()] if type(value) is dict else value
    return all(is_plain(part, depth - 1) for part in parts)


def plain_attributes(value: Any) -> dict[str, Any]:
    """Return the plain attributes of a class or function that a script may have changed."""
    return {
        name: found
        for name, found in list(getattr(value, "__dict__", {}).items())
        if not name.startswith("_") and is_plain(found)
    }


def read_module_state(modules: Iterable[types.ModuleType]) -> dict[str, bytes]:
    """Return the pickled state of modules by name: plain globals, class attributes, objects.

    Args:
        modules: A user's own modules, not those of libraries.
    """
    return {
        module.__name__: data
        for module in modules
        if (data := _dump({k: s for k, s in _states(module) if s is not None}))
    }


def _states(module: types.ModuleType) -> Iterable[tuple[str, Any]]:
    for name, value in list(vars(module).items()):
        if name.startswith("__") or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        if isinstance(value, type):
            own = value.__module__ == module.__name__
            yield name, (_Attributes(plain_attributes(value)) if own else None)
        elif is_plain(value):
            yield name, value
        else:
            yield name, _Pickled.of(value)


class _Attributes(dict[str, Any]):
    """Attributes of a class."""


class _Pickled:
    """An object that is a pickle until its module is there."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @classmethod
    def of(cls, value: Any) -> _Pickled | None:
        """Return a small object's pickle, None where there is none or it is large."""
        # Of others, such as models and arrays, even to find out the size would take long.
        if not hasattr(value, "__dict__") or hasattr(value, "__array__"):
            return None
        if not is_plain(list(vars(value).values()), depth=5):
            return None
        try:
            data = pickle.dumps(value)
        except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
            return None
        return cls(data) if len(data) <= _LARGEST else None


def _dump(states: dict[str, Any]) -> bytes:
    data: bytes = cloudpickle.dumps(states) if states else b""
    return data


def restore_module_state(
    found: Mapping[str, bytes], after_import: Callable[[str, Callable[[Any], None]], None]
) -> None:
    """Set what differs, in modules that are imported now and in others once they are.

    Args:
        found: What :func:`read_module_state` returned in the study's process.
        after_import: Calls back with a module once it is imported.
    """
    for name, data in found.items():
        after_import(name, functools.partial(_restore, data))


def _restore(data: bytes, module: types.ModuleType) -> None:
    states: Mapping[str, Any] = pickle.loads(data)
    for name, state in states.items():
        value = vars(module).get(name)
        if isinstance(state, _Attributes):
            set_attributes(value, state)
        elif isinstance(state, _Pickled):
            with contextlib.suppress(Exception):  # its class may be gone from an edited module
                _assign(module, name, pickle.loads(state.data))
        elif not _same(value, state):
            _assign(module, name, state)


def set_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    """Set those attributes of an object that differ."""
    for name, state in attributes.items():
        if not _same(getattr(owner, name, None), state):
            with contextlib.suppress(AttributeError, TypeError):  # read-only by now
                setattr(owner, name, state)


def _assign(module: types.ModuleType, name: str, state: Any) -> None:
    """Let a global have a value, in place where others may hold it too."""
    value: Any = vars(module).get(name)
    if type(value) is type(state):
        if isinstance(value, dict):
            value.clear()
            value.update(state)
            return
        if isinstance(value, list):
            value[:] = state
            return
        if isinstance(value, set):
            value.clear()
            value.update(state)
            return
        if hasattr(value, "__dict__") and not hasattr(value, "__slots__"):
            vars(value).clear()
            vars(value).update(vars(state))
            return
    setattr(module, name, state)


def _same(value: Any, state: Any) -> bool:
    return type(value) is type(state) and bool(value == state)


def set_main_state(values: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set globals of ``__main__``, and attributes of its classes and functions by their names."""
    main = sys.modules["__main__"]
    vars(main).update(values)
    for path, found in attributes.items():
        set_attributes(operator.attrgetter(path)(main), found)


def set_module_parts(name: str, parts: Mapping[str, Any]) -> None:
    """Set functions and classes of a module that the trial's process must not import."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(parts)
