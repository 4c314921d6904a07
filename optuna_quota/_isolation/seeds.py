"""Seed the random generators of a trial's process: copies would repeat each other's numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
import contextlib
import functools
import itertools
import pickle
import random
import sys
import types
from typing import Any

from optuna_quota._isolation.modules import after_import, user_modules


# The global generators.


def draw_seeds() -> dict[str, int]:
    """Return a seed for each library's global generator, drawn from those of this process."""
    seeds = {"random": random.getrandbits(32)}
    # Where only the objective imports numpy, that seeds itself.
    if "numpy" in sys.modules:
        seeds["numpy"] = int(sys.modules["numpy"].random.randint(0, 2**31 - 1))
    # torch starts with the same seed in each process.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        seeds["torch"] = int(torch.randint(0, 2**31 - 1, ()))
    else:
        seeds["torch"] = seeds["random"]
    return seeds


def seed(seeds: Mapping[str, int]) -> None:
    """Seed the global generators, now or once their library is imported."""
    for module, value in seeds.items():
        after_import(module, functools.partial(_SEEDERS[module], value))


_SEEDERS: Mapping[str, Callable[[int, Any], Any]] = {
    "random": lambda value, random: random.seed(value),
    "numpy": lambda value, numpy: numpy.random.seed(value),
    "torch": lambda value, torch: torch.manual_seed(value),
}


# Those that a script makes.


def is_generator(value: Any) -> bool:
    """Return whether this is a random generator: of ``random``, numpy, or torch on the CPU."""
    if type(value).__name__ not in _NAMES:  # soon answered: this is asked of all that is pickled
        return False
    name = _path(value)
    return name in _VARY and (name != _TORCH or value.device.type == "cpu")


def _path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def reduce_generator(value: Any) -> tuple[Any, ...]:
    """Return how to pickle a random generator: the global ones of a library by name."""
    if value is _global_of("random", "_inst"):
        return _global_of, ("random", "_inst")
    if value is _global_of("numpy.random.mtrand", "_rand"):
        return _global_of, ("numpy.random.mtrand", "_rand")
    return _load_generator, (pickle.dumps(value),)


def _global_of(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _load_generator(data: bytes) -> Any:
    generator = pickle.loads(data)
    _loaded.append(generator)
    return generator


# A search through all that a script holds would take longer than a short trial.
_MAX_SEARCHED = 2_000
_MAX_PARTS = 300
_PLAIN = {type(None), bool, bytes, float, int, str}
# Those in the pickle of the objective.
_loaded: list[Any] = []


def vary_generators(number: int, objective: Any) -> None:
    """Let the generators that a script has made give other numbers in each trial.

    Each is seeded by what it gives next and the number of the trial, so that a script with a
    fixed seed gets the same trials again.

    Args:
        number: The number of the trial.
        objective: The objective.
    """
    reached = _with_parts([*values_within_reach(objective), objective])
    held = [*_loaded, *filter(is_generator, reached)]
    for generator in {id(found): found for found in held}.values():
        draw, reseed = _VARY[_path(generator)]
        # Other generators than the default ones of a library may be unable to.
        with contextlib.suppress(TypeError, ValueError):
            reseed(generator, random.Random(f"{draw(generator)}, {number}").getrandbits(62))


def _with_parts(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values and what they hold, such as a list of estimators with a ``random_state``."""
    own = {"__main__", *(module.__name__ for module in user_modules())}
    pending, seen = deque(values), set[int]()
    while pending:
        value = pending.popleft()
        if id(value) in seen or type(value) in _PLAIN:
            continue
        seen.add(id(value))
        yield value
        if len(seen) < _MAX_SEARCHED:
            pending.extend(itertools.islice(_parts(value, own), _MAX_PARTS))


def _parts(value: Any, own: Container[str]) -> Iterable[Any]:
    """Return what a value holds; of functions and classes, only of those of the user's modules."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    is_function = isinstance(value, types.FunctionType)
    if isinstance(value, types.ModuleType):
        return ()
    if (is_function or isinstance(value, type)) and value.__module__ not in own:
        return ()
    if is_function:
        return value.__defaults__, value.__kwdefaults__, value.__closure__, vars(value)
    try:
        return (value.cell_contents,) if type(value) is types.CellType else [*vars(value).values()]
    except Exception:  # noqa: BLE001 - a user's __getattribute__ may raise anything
        return ()


def values_within_reach(objective: Any) -> Iterator[Any]:
    """Yield the globals of the user's modules, and what the objective refers to."""
    for module in [sys.modules["__main__"], *user_modules()]:
        yield from list(vars(module).values())
    owner = objective.__self__ if isinstance(objective, types.MethodType) else objective
    with contextlib.suppress(TypeError):  # without a dictionary
        yield from list(vars(owner).values())
    if isinstance(objective, types.FunctionType):
        for cell in objective.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                yield cell.cell_contents


def _reseed_numpy(generator: Any, value: int) -> None:
    bits = generator.bit_generator
    bits.state = type(bits)(value).state


def _draw_torch(generator: Any) -> int:
    return int(sys.modules["torch"].randint(2**62, (), generator=generator))


_TORCH = "torch._C.Generator"
# By class, how to draw a number and how to seed.
_VARY: Mapping[str, tuple[Callable[[Any], int], Callable[[Any, int], Any]]] = {
    "random.Random": (lambda g: g.getrandbits(62), lambda g, value: g.seed(value)),
    "numpy.random._generator.Generator": (lambda g: int(g.integers(2**62)), _reseed_numpy),
    "numpy.random.mtrand.RandomState": (
        lambda g: int(g.randint(2**31)),
        lambda g, value: g.seed([value >> 31, value & (2**31 - 1)]),
    ),
    _TORCH: (_draw_torch, lambda g, value: g.manual_seed(value)),
}
_NAMES = {path.rpartition(".")[2] for path in _VARY}
