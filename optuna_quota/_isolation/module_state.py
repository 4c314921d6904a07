"""Carries changes that a script has made to modules into its trials.

A script that sets ``config.SCALE = 10`` or ``Config.epochs = 3`` expects that in its trials too,
which import the module again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
import functools
import operator
import pickle
import pkgutil
import sys
import types
from typing import Any

from optuna_quota._isolation.modules import after_import, LEFT_TO_TRIALS, user_modules


# Objects with a larger pickle are data that the module loads itself.
_MAX_PICKLE = 1 << 14
_MAX_ITEMS = 200
_CONTAINERS = (list, tuple, set, frozenset, dict)


class _Attributes(dict[str, Any]):
    """Attributes of a class."""


class _Pickled(bytes):
    """The pickle of an object, to be loaded after its module."""


def is_plain(value: Any, depth: int = 4, *, subclasses: bool = False) -> bool:
    """Return whether a value consists of numbers, texts and small containers of them.

    Containers may be nested up to ``depth``, and with ``subclasses`` be of subclasses, such as
    dictionaries with attributes.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    is_container = isinstance(value, _CONTAINERS) if subclasses else type(value) in _CONTAINERS
    if depth == 0 or not is_container or len(value) > _MAX_ITEMS:
        return False
    parts = [*value, *(value.values() if isinstance(value, dict) else ())]
    if subclasses:
        parts += getattr(value, "__dict__", {}).values()
    return all(is_plain(part, depth - 1, subclasses=subclasses) for part in parts)


def plain_attributes(value: Any) -> dict[str, Any]:
    return {
        name: found
        for name, found in dict(getattr(value, "__dict__", {})).items()
        if not name.startswith("_") and is_plain(found)
    }


def read_module_state(modules: Iterable[types.ModuleType]) -> dict[str, bytes]:
    """Return the pickled state of a user's modules: plain globals, class attributes, objects."""
    found = {module.__name__: _read(module) for module in modules}
    return {name: pickle.dumps(state) for name, state in found.items() if state}


def read_library_constants() -> dict[str, bytes]:
    """Return constants of libraries that the script may have set, such as ``Image.MAX_PIXELS``.

    Only upper-case names of modules that the user's own code names: others may be a library's own
    state.
    """
    named = {
        value.__name__: value
        for module in [*user_modules(), sys.modules.get("__main__")]
        for value in list(vars(module).values() if module is not None else ())
        if isinstance(value, types.ModuleType)
    }
    others = (
        {module.__name__ for module in user_modules()} | sys.stdlib_module_names | LEFT_TO_TRIALS
    )
    found = {name: _constants(m) for name, m in named.items() if name not in others}
    return {name: pickle.dumps(constants) for name, constants in found.items() if constants}


def _constants(module: types.ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).copy().items()
        if name.isupper() and type(value) in (bool, int, float, str, type(None))
    }


def _read(module: types.ModuleType) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in vars(module).copy().items():
        if name.startswith("__") or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        if isinstance(value, type):
            if value.__module__ == module.__name__:
                state[name] = _Attributes(plain_attributes(value))
        elif is_plain(value):
            state[name] = value
        elif (data := _dump_small(value)) is not None:
            state[name] = _Pickled(data)
    return state


def _dump_small(value: Any) -> bytes | None:
    # Finding out the size of models and arrays would take too long.
    if hasattr(type(value), "__array__"):
        return None
    try:
        held = value if isinstance(value, _CONTAINERS) else vars(value)
        if not is_plain(held, depth=5, subclasses=True):
            return None
        data = pickle.dumps(value)
    except Exception:  # noqa: BLE001 - a user's __getattr__ or __reduce__ may raise anything
        return None
    return data if len(data) <= _MAX_PICKLE else None


def restore_module_state(states: Mapping[str, bytes]) -> None:
    """Restore what differs, in imported modules now and in others after their import."""
    for name, data in states.items():
        after_import(name, functools.partial(_restore, data))


def _restore(data: bytes, module: types.ModuleType) -> None:
    for name, state in pickle.loads(data).items():
        value = vars(module).get(name)
        if isinstance(state, _Attributes):
            set_attributes(value, state)
        elif isinstance(state, _Pickled):
            with contextlib.suppress(Exception):  # its class may be gone from an edited module
                _assign(module, name, pickle.loads(state))
        elif not _is_same(value, state):
            _assign(module, name, state)


def _assign(module: types.ModuleType, name: str, state: Any) -> None:
    """Set a global, in place if other names may refer to the same object."""
    value: Any = vars(module).get(name)
    if type(value) is type(state) and not hasattr(type(value), "__slots__"):
        if isinstance(value, (dict, set)):
            value.clear()
            value.update(state)
        elif isinstance(value, list):
            value[:] = state
        if hasattr(value, "__dict__"):
            vars(value).clear()
            vars(value).update(vars(state))
        if hasattr(value, "__dict__") or isinstance(value, (dict, set, list)):
            return
    setattr(module, name, state)


def set_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if not _is_same(getattr(owner, name, None), value):
            with contextlib.suppress(AttributeError, TypeError):  # read-only by now
                setattr(owner, name, value)


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def set_main_state(values: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    main = sys.modules["__main__"]
    vars(main).update(values)
    for path, found in attributes.items():
        set_attributes(operator.attrgetter(path)(main), found)


def set_module_parts(name: str, parts: Mapping[str, Any]) -> None:
    """Add functions and classes to a module that the trial's process must not import."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(parts)


def read_safe_globals(torch: Any) -> list[str]:
    """Return the paths of what ``torch.load`` may load: a script's classes are made later."""
    return [f"{v.__module__}:{v.__qualname__}" for v in torch.serialization.get_safe_globals()]


def set_safe_globals(torch: Any, paths: Iterable[str]) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(map(pkgutil.resolve_name, paths)))
