"""Optuna's own conformance suites, around every sampler, where Optuna applies them itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import optuna
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, QuotaSampler


MakeSampler = Callable[[], BaseSampler]

BASES: dict[str, MakeSampler] = {
    "Random": lambda: RandomSampler(seed=0),
    "TPE": lambda: TPESampler(n_startup_trials=0, seed=0),
    "TPE, univariate": lambda: TPESampler(n_startup_trials=0, multivariate=False, seed=0),
    # Not with `deterministic_objective` as well: that changes its own model, nothing around it.
    "GP": lambda: GPSampler(n_startup_trials=0, seed=0),
    "CMA-ES": lambda: CmaEsSampler(n_startup_trials=0, seed=0),
    "CMA-ES, separable": lambda: CmaEsSampler(n_startup_trials=0, use_separable_cma=True, seed=0),
    "NSGA-II": lambda: NSGAIISampler(seed=0),
    "NSGA-III": lambda: NSGAIIISampler(seed=0),
    "QMC": lambda: QMCSampler(seed=0, warn_independent_sampling=False),
    "BruteForce": lambda: BruteForceSampler(seed=0),
}

# Warnings of the base samplers themselves about spaces that don't suit them.
pytestmark = [pytest.mark.filterwarnings("ignore:Separable CMA-ES:UserWarning")]

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def around(*names: str) -> list[object]:
    """Return parameters that make a QuotaSampler around each base."""

    def wrapped(base: MakeSampler) -> MakeSampler:
        quota = Quota(n_trials=10_000, cpu_time="10h", trial_time="10h")
        limits = Limits(memory="1TiB", wall_time="1h")
        return lambda: QuotaSampler(base(), quota=quota, limits=limits)

    def marks(name: str) -> list[pytest.MarkDecorator]:
        if "GP" in name:
            return [pytest.mark.integration, pytest.mark.slow, needs_torch]
        return [] if name == "Random" else [pytest.mark.slow]

    return [pytest.param(wrapped(BASES[name]), id=name, marks=marks(name)) for name in names]


class TestBasic(BasicSamplerTestCase):
    @pytest.fixture(params=around(*(name for name in BASES if name != "BruteForce")))
    def sampler(self, request: pytest.FixtureRequest) -> MakeSampler:
        return request.param  # type: ignore[no-any-return]


class TestRelative(RelativeSamplerTestCase):
    @pytest.fixture(params=around("TPE", "CMA-ES", "CMA-ES, separable", "GP", "QMC"))
    def sampler(self, request: pytest.FixtureRequest) -> MakeSampler:
        given = request.node.callspec.params
        if "GP" in request.node.name and given.get("y_distribution") not in (
            None,
            given.get("x_distribution"),
        ):
            pytest.skip("16 s for each of 36 pairs: each distribution is tried with itself only")
        return request.param  # type: ignore[no-any-return]


class TestMultiObjective(MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=around("Random", "TPE", "GP", "NSGA-II", "NSGA-III", "QMC"))
    def sampler(self, request: pytest.FixtureRequest) -> MakeSampler:
        return request.param  # type: ignore[no-any-return]


class TestSingleOnly(SingleOnlySamplerTestCase):
    @pytest.fixture(params=around("CMA-ES"))
    def sampler(self, request: pytest.FixtureRequest) -> MakeSampler:
        return request.param  # type: ignore[no-any-return]


def objective(trial: optuna.Trial) -> float:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return trial.suggest_int("n", 0, 2) + (kind == "b")


@pytest.mark.parametrize(
    "base",
    [lambda: GridSampler({"kind": ["a", "b"], "n": [0, 1, 2]}, seed=0), BruteForceSampler],
    ids=["Grid", "BruteForce"],
)
def test_an_exhaustive_sampler_visits_each_point_once_and_ends(base: MakeSampler) -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(base(), quota=Quota(n_trials=100), limits=Limits(memory="1TiB"))
    )
    study.optimize(objective, n_trials=50)
    points = [(t.params["kind"], t.params["n"]) for t in study.trials]
    assert sorted(points) == [(kind, n) for kind in "ab" for n in range(3)]
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BASES if "GP" not in name])
def test_the_same_points_as_the_bare_sampler(name: str) -> None:
    def points(sampler: BaseSampler) -> list[dict[str, object]]:
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=12)
        return [t.params for t in study.trials]

    wrapped = QuotaSampler(BASES[name](), quota=Quota(n_trials=100))
    assert points(wrapped) == points(BASES[name]())


def several(trial: optuna.Trial) -> float:
    # Not in alphabetical order.
    x = trial.suggest_float("x", 0, 1)
    return x + trial.suggest_int("n", 1, 30) * trial.suggest_float("y", -1, 1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "TPE" else [pytest.mark.slow])
        for name in BASES
        if "GP" not in name and name != "BruteForce"
    ],
)
def test_far_limits_change_no_point(name: str) -> None:
    def points(sampler: BaseSampler) -> list[dict[str, object]]:
        study = optuna.create_study(sampler=sampler)
        study.optimize(several, n_trials=14)
        return [t.params for t in study.trials]

    def base() -> BaseSampler:
        # Enough at first that some are drawn after the footprint is known.
        return TPESampler(seed=0) if name == "TPE" else BASES[name]()

    wrapped = QuotaSampler(base(), quota=Quota(n_trials=100), limits=Limits(memory="1TiB"))
    assert points(wrapped) == points(base())


def branching(trial: optuna.Trial) -> float:
    if trial.suggest_categorical("kind", ["a", "b"]) == "a":
        return trial.suggest_float("c", 1e-3, 10, log=True)
    # A range that differs between trials.
    return trial.suggest_int("n", 1, 9 + trial.number % 2)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_far_limits_change_no_point_of_a_space_with_branches() -> None:
    def points(make: Callable[[BaseSampler], BaseSampler]) -> list[dict[str, object]]:
        # Its groups of parameters hold the conditional ones too, but until trial 10 it draws none
        # of them, and from trial 8 on the limits are learned.
        study = optuna.create_study(
            sampler=make(TPESampler(multivariate=True, group=True, seed=0))
        )
        study.optimize(branching, n_trials=14)
        return [t.params for t in study.trials]

    assert points(lambda base: QuotaSampler(base, limits=Limits(memory="1TiB"))) == points(
        lambda base: base
    )


@pytest.mark.parametrize("inside", [True, False])
def test_partially_fixed(inside: bool) -> None:
    from optuna.samplers import PartialFixedSampler

    if inside:
        fixed = PartialFixedSampler({"n": 1}, RandomSampler(seed=0))
        sampler: BaseSampler = QuotaSampler(fixed, quota=Quota(n_trials=3))
    else:
        sampler = PartialFixedSampler(
            {"n": 1}, QuotaSampler(RandomSampler(seed=0), quota=Quota(n_trials=3))
        )
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=9)
    assert [t.params["n"] for t in study.trials] == [1, 1, 1]
    assert all("quota:outcome" in t.user_attrs for t in study.trials)
