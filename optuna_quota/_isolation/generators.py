"""Let the random generators that a script has made give other numbers in each trial."""

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

from optuna_quota._isolation.modules import user_modules


def is_generator(value: Any) -> bool:
    return _way_of(type(value), value) is not None


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def reduce_generator(value: Any) -> tuple[Any, ...]:
    """Return how to pickle a random generator: the global ones of a library by name."""
    for place in (("random", "_inst"), ("numpy.random.mtrand", "_rand")):
        if value is _global_of(*place):
            return _global_of, place
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
_LEAVES = {type(None), bool, bytes, float, int, str}
# Those in the pickle of the objective.
_loaded: list[Any] = []


def find_generators(objective: Any) -> list[Any]:
    """Return the generators and seed sequences that a script and its objective hold."""
    reached = _with_parts([*values_within_reach(objective), objective])
    return [v for v in [*_loaded, *reached] if _is_seed_sequence(v) or _way_to_vary(v) is not None]


def vary_generators(number: int, generators: Iterable[Any]) -> None:
    """Let the generators that a script has made give other numbers in each trial.

    Each is seeded by what it gives next and the number of the trial, so that a script with a
    fixed seed gets the same trials again. A seed sequence keeps what it gives, and has other
    children.
    """
    held = {id(found): found for found in generators}.values()
    sequences = {id(found): found for found in held if _is_seed_sequence(found)}
    for generator in held:
        # Some can't be seeded, and methods of a user's class may raise anything.
        with contextlib.suppress(Exception):
            _vary(generator, number, sequences)
    for sequence in sequences.values():
        _skip_children(sequence, number)


def _vary(value: Any, number: int, sequences: dict[int, Any]) -> None:
    """Seed a generator, and add the seed sequence that it was made from."""
    way = _way_to_vary(value)
    if way is None:
        return
    draw, seed, bits_of = way
    bits = bits_of(value)
    sequence = getattr(bits, "seed_seq", None)
    if _is_seed_sequence(sequence):
        sequences[id(sequence)] = sequence
    lock = getattr(bits, "lock", None)
    if lock is not None:
        # In a fork it stays held for good if another thread drew from it just then.
        if not lock.acquire(blocking=False):
            return
        lock.release()
    seed(value, random.Random(f"{draw(value)}, {number}").getrandbits(62))


def _way_to_vary(value: Any) -> _Way | None:
    """Return how to draw from and seed a generator; a user's class may derive from a library's."""
    ways = (_way_of(base, value) for base in type(value).__mro__)
    return next((way for way in ways if way is not None), None)


def _way_of(kind: type, value: Any) -> _Way | None:
    """Return the same for a value of this class, None if it is no generator's."""
    if kind.__name__ not in _NAMES:  # soon answered: this is asked of all that is pickled
        return None
    path = _path(kind)
    return _WAYS.get(path) if path != _TORCH or value.device.type == "cpu" else None


def _is_seed_sequence(value: Any) -> bool:
    return type(value).__name__ == "SeedSequence" and _path(type(value)) == _SEED_SEQUENCE


def _skip_children(sequence: Any, number: int) -> None:
    """Let a trial's children of a numpy SeedSequence be others than those of earlier trials.

    Numpy counts them in 32 bits. The first trial has those that it would have in process, and the
    bits of the number in reverse keep those of any two trials as far apart as can be.
    """
    skipped = int(f"{number % 2**32:032b}"[::-1], 2)
    sequence.__init__(
        sequence.entropy,
        spawn_key=sequence.spawn_key,
        pool_size=sequence.pool_size,
        n_children_spawned=(sequence.n_children_spawned + skipped) % 2**32,
    )


def _with_parts(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values and what they hold, such as a list of estimators with a ``random_state``."""
    own = {"__main__", *(module.__name__ for module in user_modules())}
    pending, seen = deque(values), set[int]()
    most = len(pending) + _MAX_SEARCHED
    while pending:
        value = pending.popleft()
        if id(value) in seen or type(value) in _LEAVES:
            continue
        seen.add(id(value))
        yield value
        if len(seen) < most:
            with contextlib.suppress(Exception):  # methods of a user's class may raise anything
                pending.extend(itertools.islice(_parts(value, own), _MAX_PARTS))


def _parts(value: Any, own: Container[str]) -> Iterable[Any]:
    """Return what a value holds; of functions and classes, only of those of the user's modules."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, types.ModuleType):
        return ()
    if isinstance(value, (types.FunctionType, type)) and value.__module__ not in own:
        return ()
    if isinstance(value, types.FunctionType):
        return value.__defaults__, value.__kwdefaults__, value.__closure__, vars(value)
    return (value.cell_contents,) if type(value) is types.CellType else vars(value).values()


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


def _seed_bits(bits: Any, value: int) -> None:
    bits.state = type(bits)(value).state


def _seed_state(state: Any, value: int) -> None:
    try:
        state.seed([value >> 31, value & (2**31 - 1)])
    except TypeError:  # of other bits than MT19937
        _seed_bits(state._bit_generator, value)


def _draw_torch(generator: Any) -> int:
    return int(sys.modules["torch"].randint(2**62, (), generator=generator))


_SEED_SEQUENCE = "numpy.random.bit_generator.SeedSequence"
_TORCH = "torch._C.Generator"
_BITS = ("_mt19937.MT19937", "_pcg64.PCG64", "_pcg64.PCG64DXSM", "_philox.Philox", "_sfc64.SFC64")
_Way = tuple[Callable[[Any], int], Callable[[Any, int], Any], Callable[[Any], Any]]
# By class, how to draw a number, how to seed, and how to get numpy's bit generator underneath.
_WAYS: Mapping[str, _Way] = {
    "random.Random": (lambda g: g.getrandbits(62), lambda g, value: g.seed(value), lambda g: None),
    _TORCH: (_draw_torch, lambda g, value: g.manual_seed(value), lambda g: None),
    "numpy.random.mtrand.RandomState": (
        lambda g: int(g.randint(2**31)),
        _seed_state,
        lambda g: g._bit_generator,
    ),
    "numpy.random._generator.Generator": (
        lambda g: int(g.integers(2**62)),
        lambda g, value: _seed_bits(g.bit_generator, value),
        lambda g: g.bit_generator,
    ),
    **{
        f"numpy.random.{name}": (lambda g: int(g.random_raw()), _seed_bits, lambda g: g)
        for name in _BITS
    },
}
_NAMES = {path.rpartition(".")[2] for path in _WAYS}
