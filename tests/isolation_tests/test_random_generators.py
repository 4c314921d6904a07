"""Random generators that a script holds give other numbers in each isolated trial."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import random
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation.random_generators import vary_generators
from tests.isolation_tests.scripts import run_script


HELD = """
import types, numpy as np
rng = np.random.default_rng(3)
splits = types.SimpleNamespace(random_state=np.random.RandomState(3))
def drawn(rng=np.random.default_rng(3)): return rng.random()
class Noise: rng = np.random.default_rng(3)
"""
HOLDS_GENERATORS = """
import functools, random, types, numpy as np, held
from random import random as draw
rng, state, mine = np.random.default_rng(7), np.random.RandomState(7), random.Random(7)
parts = types.SimpleNamespace(by_name={"all": [np.random.default_rng(7)]})
partial = functools.partial(lambda rng: rng.random(), rng=np.random.default_rng(7))
def default(rng=np.random.default_rng(7)): return rng.random()

def objective(trial, inner):
    held_ones = (held.rng, held.splits.random_state, held.Noise.rng, parts.by_name["all"][0])
    drawn = [g.random() for g in (rng, state, mine, *held_ones, inner)]
    trial.set_user_attr("drawn", [*drawn, partial(), default(), held.drawn()])
    return draw()

def found(method):
    random.seed(7)
    study = optuna.create_study()
    inner = np.random.default_rng(9)
    study.optimize(isolated(lambda t: objective(t, inner), start_method=method), n_trials=3)
    return [[t.value, *t.user_attrs["drawn"]] for t in study.trials]

if __name__ == "__main__":
    say(**{method: [found(method) for _ in range(2)] for method in ("forkserver", "fork")})
"""


def test_generators_that_the_script_holds_differ_by_trial_and_follow_the_seed(
    tmp_path: Path,
) -> None:
    (tmp_path / "held.py").write_text(HELD)
    for first, again in run_script(tmp_path, HOLDS_GENERATORS).values():
        assert [len(set(drawn)) for drawn in zip(*first, strict=True)] == [3] * 12
        assert first == again


OTHER_GENERATORS = """
import random, numpy as np

class Loaded(random.Random):
    pass

class Unseeded(random.Random):
    def seed(self, value=None):
        if value is not None:
            raise NotImplementedError

bits, mine, unseeded = np.random.Philox(7), Loaded(7), Unseeded()
sequence, parent = np.random.SeedSequence(7), np.random.default_rng(7)

def objective(trial):
    fixed = np.random.default_rng(sequence).random()
    child = np.random.default_rng(sequence.spawn(1)[0])
    grandchild = parent.bit_generator.seed_seq.spawn(2)[1].spawn(1)[0]
    drawn = (np.random.Generator(bits), mine, child, np.random.default_rng(grandchild))
    trial.set_user_attr("drawn", [unseeded.random() < 1, fixed, *(g.random() for g in drawn)])
    return 0.0

def found(method):
    study = optuna.create_study()
    study.optimize(isolated(objective, start_method=method), n_trials=3)
    return [t.user_attrs["drawn"] for t in study.trials]

if __name__ == "__main__":
    say(**{method: [found(method) for _ in range(2)] for method in METHODS})
"""


@pytest.mark.slow
def test_bits_seed_sequences_and_generators_of_a_class_of_the_user_differ_by_trial(
    tmp_path: Path,
) -> None:
    for first, again in run_script(tmp_path, OTHER_GENERATORS).values():
        # A sequence that seeds a generator in each trial gives the same seed, as in process.
        differ = [len(set(drawn)) for drawn in zip(*first, strict=True)]
        assert differ == [1, 1, 3, 3, 3, 3]
        assert first == again


@pytest.mark.parametrize("number", [1, 4_095, 4_096, 1_000_000])
def test_children_of_a_seed_sequence_differ_in_every_trial(number: int) -> None:
    def child(of: int) -> list[int]:
        sequence = np.random.SeedSequence(7)
        vary_generators(of, [sequence])
        return sequence.spawn(1)[0].generate_state(2).tolist()

    assert child(0) == np.random.SeedSequence(7).spawn(1)[0].generate_state(2).tolist()
    assert child(number) not in (child(0), child(number - 1))


def test_numbers_of_any_state_differ_by_trial() -> None:
    class Lazy(random.Random):
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    def drawn(number: int) -> tuple[float, float]:
        state, lazy = np.random.RandomState(np.random.PCG64(3)), Lazy(3)
        vary_generators(number, [state])
        vary_generators(number, [lazy])
        return state.rand(), lazy.random()

    for one, other in zip(drawn(0), drawn(1), strict=True):
        assert one != other


def test_a_generator_that_another_thread_draws_from_does_not_hold_up_a_fork() -> None:
    generator = np.random.default_rng(3)
    with ThreadPoolExecutor(1) as other:
        other.submit(generator.bit_generator.lock.acquire).result()
        vary_generators(1, [generator])
        other.submit(generator.bit_generator.lock.release).result()
    assert generator.random() == np.random.default_rng(3).random()


MANY_GLOBALS = """
import types, numpy as np
from optuna_quota import Quota, QuotaSampler
{functions}
class Lazy(dict):
    def values(self):
        raise RuntimeError("lazy")
lazy, nameless = Lazy(a=1), eval("type('Nameless', (), dict())", {{}})
assert not hasattr(nameless, "__module__")
{large}
splits = types.SimpleNamespace(random_state=np.random.RandomState(7))

def objective(trial):
    return float(splits.random_state.rand())

if __name__ == "__main__":
    found = {{}}
    for method in ("fork", "forkserver"):
        study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
        study.optimize(isolated(objective, start_method=method), n_trials=3)
        rows = [(t.value, t.user_attrs.get("quota:memory")) for t in study.trials]
        found[method] = list(zip(*rows))
    say(**found)
"""


def test_many_globals_and_odd_ones_hide_no_generator(tmp_path: Path) -> None:
    functions = "\n".join(f"def function_{i}(): pass" for i in range(2100))
    for values, _ in run_script(
        tmp_path, MANY_GLOBALS.format(functions=functions, large="")
    ).values():
        assert None not in values
        assert len(set(values)) == 3


@pytest.mark.slow
def test_the_search_for_generators_copies_no_page_of_a_large_global(tmp_path: Path) -> None:
    large = "large = [float(i) for i in range(2_000_000)]"
    found = run_script(tmp_path, MANY_GLOBALS.format(functions="", large=large))
    _, memory = found["fork"]
    # Its elements fill 46 MiB.
    # A trial that is shorter than a reading has none.
    assert max(amount for amount in memory if amount is not None) < 25 * 2**20


@pytest.mark.integration
def test_generators_of_torch_differ_by_trial() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    study = optuna.create_study()
    study.optimize(isolated(lambda t: float(torch.rand(1, generator=generator))), n_trials=3)
    assert len({t.value for t in study.trials}) == 3
