"""Random generators: seed them differently in each trial, and pickle those of a script.

The study's generators determine the seeds: trials differ, and are the same in each run of a script
with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import operator
import pickle
import random
import sys
import types
from typing import Any

from optuna_quota._enforcement.nesting import parts_of, walk
from optuna_quota._isolation.modules import after_import, closure_variables, user_modules


# The global generators of libraries.


def draw_seeds() -> dict[str, int]:
    """Return seeds for the global generators of a trial, drawn from those of this process."""
    seeds = {"random": random.getrandbits(32)}
    # Where only the objective imports numpy, that seeds itself.
    if "numpy" in sys.modules:
        seeds["numpy"] = int(sys.modules["numpy"].random.randint(0, 2**31 - 1))
    # torch starts with the same seed in each process.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        seeds["torch"] = int(torch.randint(0, 2**31 - 1, (), device="cpu"))
    else:
        seeds["torch"] = seeds["random"]
    return seeds


def seed_global_generators(seeds: Mapping[str, int]) -> None:
    """Seed the global generators, now or once their library is imported."""
    functions = {"random": "seed", "numpy": "random.seed", "torch": "manual_seed"}
    for name, value in seeds.items():
        after_import(name, functools.partial(_seed, functions[name], value))


def _seed(function: str, value: int, module: Any) -> None:
    operator.attrgetter(function)(module)(value)


# Those that a script has made.


def is_generator(value: Any) -> bool:
    return _is_class_of(value, type(value))


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def reduce_generator(value: Any) -> tuple[Any, ...]:
    """Return the reduced value of a random generator: global ones of a library go by name."""
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
_LEAVES = {type(None), bool, bytes, float, int, str}
# Those in the pickle of the objective.
_loaded: list[Any] = []


def find_generators(objective: Any) -> list[Any]:
    """Return the generators and seed sequences that a script and its objective hold."""
    reached = _with_parts([*values_within_reach(objective), objective])
    return [v for v in [*_loaded, *reached] if _is_seed_sequence(v) or _is_derived(v)]


def vary_generators(number: int, generators: Iterable[Any]) -> None:
    """Seed the generators of a script differently in each trial.

    The seed is made of the generator's next number and the number of the trial, so that a script
    with a fixed seed is reproducible. A seed sequence keeps its state but spawns other children.
    """
    held = {id(found): found for found in generators}.values()
    sequences = {id(found): found for found in held if _is_seed_sequence(found)}
    for generator in filter(_is_derived, held):
        # Some can't be seeded, and methods of a user's class may raise anything.
        with contextlib.suppress(Exception):
            _vary(generator, number, sequences)
    for sequence in sequences.values():
        _skip_children(sequence, number)


def _vary(value: Any, number: int, sequences: dict[int, Any]) -> None:
    """Seed a generator, and add the seed sequence that it was made from."""
    if isinstance(value, random.Random):
        value.seed(_mixed(value.getrandbits(62), number))
        return
    bits = getattr(value, "_bit_generator", value)  # numpy's, underneath
    if not hasattr(bits, "random_raw"):
        drawn = sys.modules["torch"].randint(2**62, (), generator=value, device="cpu")
        value.manual_seed(_mixed(int(drawn), number))
        return
    sequence = getattr(bits, "seed_seq", None)
    if _is_seed_sequence(sequence):
        sequences[id(sequence)] = sequence
    # In a fork it stays locked if another thread was drawing from it.
    if bits.lock.acquire(blocking=False):
        bits.lock.release()
        state = type(bits)(_mixed(bits.random_raw(), number)).state
        if hasattr(value, "set_state"):  # a RandomState, which may keep a number for later
            value.set_state(state)
        else:
            bits.state = state


def _mixed(drawn: int, number: int) -> int:
    return random.Random(f"{drawn}, {number}").getrandbits(62)


def _is_derived(value: Any) -> bool:
    """Return whether this is a generator; a user's class may derive from a library's."""
    return any(_is_class_of(value, base) for base in type(value).__mro__)


def _is_class_of(value: Any, kind: type) -> bool:
    """Return whether this class of a value is one of a library's generators."""
    if kind.__name__ not in _NAMES:  # fast, as it is called for each pickled object
        return False
    path = _path(kind)
    return path in _GENERATORS and (path != _TORCH or value.device.type == "cpu")


def _is_seed_sequence(value: Any) -> bool:
    return type(value).__name__ == "SeedSequence" and _path(type(value)) == _SEED_SEQUENCE


def _skip_children(sequence: Any, number: int) -> None:
    """Make a numpy SeedSequence spawn other children than in earlier trials.

    Numpy counts children in 32 bits. The first trial gets the same children as in process;
    reversed bits of the trial's number keep the children of any two trials as far apart as
    possible.
    """
    skipped = int(f"{number % 2**32:032b}"[::-1], 2)
    sequence.__init__(
        sequence.entropy,
        spawn_key=sequence.spawn_key,
        pool_size=sequence.pool_size,
        n_children_spawned=(sequence.n_children_spawned + skipped) % 2**32,
    )


def _with_parts(values: Sequence[Any]) -> Iterator[Any]:
    """Yield values and their parts, such as a list of estimators with a ``random_state``."""
    own = {"__main__", *(module.__name__ for module in user_modules())}
    return walk(values, functools.partial(_parts, own), most=len(values) + _MAX_SEARCHED)


def _parts(own: Container[str], value: Any) -> Iterable[Any]:
    """Return the parts of a value; of functions and classes, only those of the user's modules."""
    is_code = isinstance(value, (types.FunctionType, type))
    if isinstance(value, types.ModuleType) or (is_code and value.__module__ not in own):
        return ()
    held = parts_of(value)
    parts = vars(value).values() if held is None else held
    return (part for part in parts if type(part) not in _LEAVES)


def values_within_reach(objective: Any) -> Iterator[Any]:
    """Yield the globals of the user's modules, and what the objective refers to."""
    for module in [sys.modules["__main__"], *user_modules()]:
        yield from list(vars(module).values())
    owner = objective.__self__ if isinstance(objective, types.MethodType) else objective
    with contextlib.suppress(TypeError):  # without a dictionary
        yield from list(vars(owner).values())
    if isinstance(objective, types.FunctionType):
        yield from closure_variables(objective).values()


_SEED_SEQUENCE = "numpy.random.bit_generator.SeedSequence"
_TORCH = "torch._C.Generator"
_GENERATORS = {
    "random.Random",
    _TORCH,
    *("numpy.random.mtrand.RandomState", "numpy.random._generator.Generator"),
    *("numpy.random._mt19937.MT19937", "numpy.random._philox.Philox", "numpy.random._sfc64.SFC64"),
    *("numpy.random._pcg64.PCG64", "numpy.random._pcg64.PCG64DXSM"),
}
_NAMES = {path.rpartition(".")[2] for path in _GENERATORS}
