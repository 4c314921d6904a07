"""Variables of a script and its modules: carried into trials, and what trials change of them.

A script that sets ``config.SCALE = 10`` or ``Config.epochs = 3`` expects that in its trials too,
which import the module again. And in process, an objective may append to a list or remember the
best model: in a trial's process it does so to a copy, without an error. The user has to be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
from dataclasses import dataclass
import functools
import operator
import pickle
import pkgutil
import sys
import types
from typing import Any

from optuna_quota._isolation.modules import (
    after_import,
    closure_variables,
    is_installed,
    LEFT_TO_TRIALS,
    user_modules,
)


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


# What a trial changes.

# Going through all items of a script's data would take time, and copy the pages of a fork.
_MAX_MARKED = 100
_MAX_ALL_MARKED = 2_000
_PLAIN = {bool, int, float, complex, str, type(None)}
_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)


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
    left = _MAX_ALL_MARKED
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
                    if type(held) in (list, dict, set, deque) and len(held) <= min(
                        left, _MAX_MARKED
                    ):
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
