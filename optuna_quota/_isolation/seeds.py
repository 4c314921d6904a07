"""Seed the random generators of a trial's process: copies would repeat each other's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
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
    reached = _with_attributes(values_within_reach(objective))
    held = [*_loaded, *filter(is_generator, reached)]
    for generator in {id(found): found for found in held}.values():
        draw, reseed = _VARY[_path(generator)]
        # Other generators than the default ones of a library may be unable to.
        with contextlib.suppress(TypeError, ValueError):
            reseed(generator, random.Random(f"{draw(generator)}, {number}").getrandbits(62))


def _with_attributes(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values and what their attributes hold, such as an estimator's ``random_state``."""
    for value in values:
        yield value
        if not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            with contextlib.suppress(Exception):  # a user's __getattribute__ may raise anything
                yield from list(vars(value).values())


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
