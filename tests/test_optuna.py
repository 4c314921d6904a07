"""The private parts of Optuna that the package uses work as `_optuna` expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
import gc
import json
from pathlib import Path
import sys
import threading
import time
from typing import Any, NoReturn

import optuna
from optuna.distributions import FloatDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import (
    CmaEsSampler,
    NSGAIIISampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages._rdb.models import TrialUserAttributeModel
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
import pytest
from sqlalchemy.dialects import mysql

from optuna_quota import _optuna


@pytest.fixture(scope="module", params=["memory", "sqlite", "journal"])
def storage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> BaseStorage:
    folder = tmp_path_factory.mktemp("storage")
    if request.param == "memory":
        return InMemoryStorage()
    if request.param == "journal":
        return JournalStorage(JournalFileBackend(str(folder / "j.log")))
    return RDBStorage(f"sqlite:///{folder}/s.db")


def test_ids_and_storage() -> None:
    study = optuna.create_study()
    trial = study.ask()
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    assert storage.get_trial(trial_id).number == trial.number
    assert _optuna.trial_id_of(study.trials[0]) == trial_id
    assert storage.get_study_name_from_id(_optuna.study_id_of(study)) == study.study_name


def test_cached_row() -> None:
    study = optuna.create_study()
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    kept = _optuna.cached_row(trial)
    assert kept.number == trial.number and kept.params == trial.params
    assert _optuna.cached_row(kept) is kept


def test_in_optimize_loop() -> None:
    study = optuna.create_study()
    assert not _optuna.in_optimize_loop(study)
    seen = []

    def objective(trial: optuna.Trial) -> float:
        seen.append(_optuna.in_optimize_loop(study))
        study.stop()
        return 0.0

    study.optimize(objective, n_trials=3)
    assert seen == [True]
    with pytest.raises(RuntimeError):
        study.stop()


def test_is_asked_by_user() -> None:
    seen = []

    class Sampler(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            seen.append(_optuna.is_asked_by_user())

    def objective(trial: optuna.Trial) -> float:
        trial.study.tell(trial.study.ask(), 1.0)
        return 0.0

    study = optuna.create_study(sampler=Sampler())
    study.optimize(objective, n_trials=1)
    study.ask()
    assert seen == [False, True, True]
    assert not _optuna.is_asked_by_user()


def test_is_run_by_optimize() -> None:
    study = optuna.create_study()
    seen: list[tuple[bool, bool, bool]] = []

    def objective(trial: optuna.Trial) -> float:
        asked = optuna.create_study().ask()
        elsewhere: list[bool] = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(_optuna.is_run_by_optimize(trial))
        )
        thread.start()
        thread.join()
        seen.append(
            (
                _optuna.is_run_by_optimize(trial),
                _optuna.is_run_by_optimize(asked),
                elsewhere[0],
            )
        )
        return 0.0

    study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=2, n_jobs=2)
    assert seen == [(True, False, False)] * 3


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_optimize_is_ending_once_stopped_or_timed_out(n_jobs: int) -> None:
    study = optuna.create_study()
    assert not _optuna.is_optimize_ending(study)
    seen = []

    def stopped(trial: optuna.Trial) -> float:
        before = _optuna.is_optimize_ending(study)
        study.stop()
        seen.append((before, _optuna.is_optimize_ending(study)))
        return 0.0

    study.optimize(stopped, n_trials=1, n_jobs=n_jobs)

    def timed_out(trial: optuna.Trial) -> float:
        before = _optuna.is_optimize_ending(study)
        time.sleep(0.6)
        seen.append((before, _optuna.is_optimize_ending(study)))
        return 0.0

    study.optimize(timed_out, n_trials=1, timeout=0.5, n_jobs=n_jobs)
    assert seen == [(False, True), (False, True)]


class Witness(RandomSampler):
    """Says what it sees in its hooks."""

    def __init__(self, look: Callable[[optuna.Study], Any]) -> None:
        super().__init__()
        self.look = look
        self.seen: dict[str, Any] = {}

    def before_trial(self, study: Any, trial: Any) -> None:
        self.seen["before_trial"] = self.look(study)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        self.seen["sample_independent"] = self.look(study)
        return super().sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.seen["after_trial"] = self.look(study)


def test_unwrap_study_finds_the_study_behind_a_bracket() -> None:
    sampler = Witness(lambda study: (type(study).__name__, _optuna.unwrap_study(study)))
    study = optuna.create_study(sampler=sampler, pruner=HyperbandPruner(max_resource=9))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert len(sampler.seen) == 3
    for name, whole in sampler.seen.values():
        assert name == "_BracketStudy"
        assert whole is study
    assert _optuna.unwrap_study(study) is study


def test_in_ask() -> None:
    sampler = Witness(lambda study: _optuna.in_ask())
    study = optuna.create_study(sampler=sampler)
    study.tell(study.ask({"x": FloatDistribution(0, 1)}), 0.0)
    assert sampler.seen == {
        "before_trial": True,
        "sample_independent": True,
        "after_trial": False,
    }
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    assert sampler.seen["sample_independent"] is False


def test_objective_error_in_after_trial() -> None:
    sampler = Witness(lambda study: _optuna.objective_error())
    study = optuna.create_study(sampler=sampler)

    def fails(trial: optuna.Trial) -> float:
        raise ValueError("why")

    study.optimize(fails, n_trials=1, catch=ValueError)
    assert repr(sampler.seen["after_trial"]) == "ValueError('why')"
    study.optimize(lambda trial: 0.0, n_trials=1)
    assert sampler.seen["after_trial"] is None


def test_in_objective() -> None:
    seen: dict[str, bool] = {}
    sampler = Witness(lambda study: _optuna.in_objective(sys._getframe(1)))

    def objective(trial: optuna.Trial) -> float:
        seen["objective"] = _optuna.in_objective(sys._getframe())
        return trial.suggest_float("x", 0, 1)

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=1)
    assert seen == {"objective": True}
    assert set(sampler.seen.values()) == {False}
    assert not _optuna.in_objective(sys._getframe())


def test_attributes_are_written_in_a_batch(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    storage = _optuna.storage_of(study)
    trial_id = _optuna.trial_id_of(study.ask())
    user: Mapping[str, Any] = {"a": 1, "b": {"c": [1.5, None]}, "d": "text"}
    _optuna.write_attributes(storage, trial_id, {"a": 0}, {})
    _optuna.write_attributes(storage, trial_id, user, {"constraints": [-1.0, 2.0]})
    study.tell(0, 1.0)
    (trial,) = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert trial.user_attrs == user
    assert _optuna.constraints_of(trial) == {"0": -1.0, "1": 2.0}
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        _optuna.write_attributes(storage, trial_id, user, {"constraints": [0.0]})
    # Nothing of that is left to be raised by the next call.
    _optuna.write_attributes(storage, _optuna.trial_id_of(study.ask()), user, {"a": 1})
    assert study.trials[1].user_attrs == user


def test_batch_writers_fit_this_version_of_optuna(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    storage = _optuna.storage_of(study)
    name = type(storage).__name__
    write_batch = _optuna.storages._BATCH_WRITERS.get(name, _optuna.write_attributes)
    write_batch(storage, _optuna.trial_id_of(study.ask()), {"a": 1}, {"b": 2})
    assert study.trials[0].user_attrs == {"a": 1}
    assert study.trials[0].system_attrs == {"b": 2}


def test_without_a_batch_writer_attributes_are_written_one_by_one(
    storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> None:
        raise AttributeError("_set_trial_attr_without_commit")

    study = optuna.create_study(storage=storage)
    storage = _optuna.storage_of(study)
    monkeypatch.setattr(_optuna.storages, "_BATCH_WRITERS", {type(storage).__name__: gone})
    _optuna.write_attributes(storage, _optuna.trial_id_of(study.ask()), {"a": 1, "b": 2}, {"c": 3})
    assert study.trials[0].user_attrs == {"a": 1, "b": 2}
    assert study.trials[0].system_attrs["c"] == 3


@pytest.mark.parametrize("dialect", ["mariadb", "cockroachdb", "mssql"])
def test_a_database_of_another_dialect(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    storage = _optuna.storage_of(study)
    trial_id = _optuna.trial_id_of(study.ask())
    engine: Any = _optuna.storages._engine_of(storage)
    if dialect == "mariadb":
        statement = _optuna.storages._upsert_into(TrialUserAttributeModel, dialect)
        assert "ON DUPLICATE KEY UPDATE" in str(statement.compile(dialect=mysql.dialect()))
        return
    monkeypatch.setattr(engine.dialect, "name", dialect)
    _optuna.write_attributes(storage, trial_id, {"a": 1}, {"b": 2})
    assert study.trials[0].user_attrs == {"a": 1}
    assert study.trials[0].system_attrs["b"] == 2


def test_a_row_is_finished_once() -> None:
    study = optuna.create_study()
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(study.ask())
    _optuna.finish_row(storage, trial_id, TrialState.FAIL)
    _optuna.finish_row(storage, trial_id, TrialState.PRUNED)
    assert study.trials[0].state == TrialState.FAIL


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone is the system's here")
def test_a_row_on_sqlite_fails_now_in_any_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        study = optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db")
        storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(study.ask())
        before = datetime.now()
        fails = [_optuna.fail_row_on_sqlite(storage, trial_id) for _ in range(2)]
        trial = study.trials[0]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (fails, trial.state) == ([True, False], TrialState.FAIL)
    assert trial.datetime_complete is not None
    assert before <= trial.datetime_complete < before + timedelta(minutes=5)


@pytest.mark.filterwarnings("ignore:.constraints_func:FutureWarning")
def test_may_write_constraints() -> None:
    assert not _optuna.may_write_constraints(TPESampler())
    assert not _optuna.may_write_constraints(NSGAIISampler())
    assert not _optuna.may_write_constraints(RandomSampler())
    # Those that know none are taken for ones that may: the row is then read again.
    assert _optuna.may_write_constraints(CmaEsSampler())

    def constrained(trial: optuna.trial.FrozenTrial) -> tuple[float]:
        return (0.0,)

    assert _optuna.may_write_constraints(TPESampler(constraints_func=constrained))


def learned_values(sampler: Any) -> list[float]:
    """Return what a sampler draws for x where 0 is best and less than a half is infeasible."""
    space = {"x": FloatDistribution(0, 1)}
    study = optuna.create_study(sampler=RandomSampler())
    # Of one generation, for NSGA.
    key = sampler._get_generation_key() if hasattr(sampler, "_get_generation_key") else "unused"
    for x in range(1, 41):
        row = optuna.trial.create_trial(
            params={"x": x / 40},
            distributions=space,  # type: ignore[arg-type]
            value=x / 40,
            # Those within their limits have no constraints.
            system_attrs={key: 0, "constraints": [0.5]} if x < 20 else {key: 0},
        )
        study.add_trial(row)

    def constrain(trials: Any) -> Any:
        return [{"c": 0.5 - trial.params["x"]} for trial in trials]

    demanding = _optuna.demands_uniform_constraints(sampler)
    found = []
    for _ in range(20):
        trial = study.ask()
        frozen = study.trials[-1]
        with _optuna.learn_constraints(
            study, [sampler], frozen, constrain if demanding else None, limited=lambda: True
        ) as seen:
            drawn = sampler.sample_relative(seen, frozen, space)
            x = drawn.get("x") or sampler.sample_independent(seen, frozen, "x", space["x"])
        found.append(x)
        study.tell(trial, state=TrialState.FAIL)
    return found


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(TPESampler(seed=0), id="TPE"),
        pytest.param(NSGAIISampler(population_size=20, mutation_prob=0.0, seed=0), id="NSGA-II"),
        pytest.param(NSGAIIISampler(population_size=20, mutation_prob=0.0, seed=0), id="NSGA-III"),
    ],
)
def test_samplers_learn_constraints_in_all_versions(sampler: Any) -> None:
    parts = [each for each in vars(sampler).values() if hasattr(each, "_constraints_func")]
    found = learned_values(sampler)
    assert sum(x >= 0.45 for x in found) >= 15
    assert [each._constraints_func for each in (sampler, *parts)] == [None] * (1 + len(parts))


def test_a_completed_trial_beside_constrained_ones_is_feasible_in_all_versions() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    storage = _optuna.storage_of(study)
    for constrained in (True, False):
        trial = study.ask()
        attributes = {"constraints": [1.0]} if constrained else _optuna.feasible_attributes({})
        _optuna.write_attributes(storage, _optuna.trial_id_of(trial), {}, attributes)
        study.tell(trial, [1.0, 1.0])
    assert [trial.number for trial in study.best_trials] == [1]


class RaisingSampler(RandomSampler):
    """Raises at the first suggestion of each trial."""

    def before_trial(self, study: Any, trial: Any) -> None:
        def refuse() -> NoReturn:
            raise optuna.TrialPruned("refused")

        study._storage.set_trial_user_attr(trial._trial_id, "touched", True)
        _optuna.raise_on_next_suggest(trial, refuse)


@pytest.mark.parametrize("enqueued", [True, False])
@pytest.mark.parametrize(
    "suggest",
    [
        lambda trial: trial.suggest_float("x", 0, 1),
        lambda trial: trial.suggest_float("x", 1, 1),
        lambda trial: trial.suggest_categorical("x", ["only"]),
        lambda trial: trial.suggest_int("y", 0, 3),
    ],
)
def test_raise_on_next_suggest(
    storage: BaseStorage, enqueued: bool, suggest: Callable[[optuna.Trial], Any]
) -> None:
    study = optuna.create_study(storage=storage, sampler=RaisingSampler())
    if enqueued:
        study.enqueue_trial({"x": 0.5})

    def objective(trial: optuna.Trial) -> float:
        suggest(trial)
        raise AssertionError("went on")

    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.system_attrs.get("fixed_params") == ({"x": 0.5} if enqueued else None)


def test_enqueued_parameters_are_seen_and_parameters_can_be_written(
    storage: BaseStorage,
) -> None:
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 0.5})
    study.ask()
    running = study.trials[0]
    assert _optuna.fixed_params_of(running) == {"x": 0.5}
    _optuna.write_param(study, running, "y", 0.25, FloatDistribution(0, 1))
    assert study.trials[0].params["y"] == 0.25
    study.ask()
    assert _optuna.fixed_params_of(study.trials[1]) == {}


def test_share_relative_params() -> None:
    study = optuna.create_study(
        sampler=TPESampler(seed=0, multivariate=True, constant_liar=True, n_startup_trials=2)
    )
    names = [f"a_parameter_with_a_long_name_{i}" for i in range(60)]
    space = {name: FloatDistribution(0, 1) for name in names}
    for _ in range(3):
        study.tell(study.ask(space), 1.0)  # type: ignore[arg-type]
    study.ask(space)  # type: ignore[arg-type]

    def shared() -> Any:
        attributes = study.trials[-1].system_attrs
        keys = [key for key in attributes if key.startswith("tpe:relative_params:")]
        keys.sort(key=lambda key: int(key.rpartition(":")[2]))
        return json.loads("".join(attributes[key] for key in keys)), len(keys)

    drawn, pieces = shared()
    assert set(drawn) == set(names)
    assert pieces > 1
    for replacement in ({"x": 0.5}, dict.fromkeys(names, 0.123456789)):
        _optuna.share_relative_params(study, study.trials[-1], replacement)
        assert shared()[0] == replacement


def test_cma_es_with_margin_needs_the_drawn_point() -> None:
    assert _optuna.needs_drawn_point(CmaEsSampler(with_margin=True))
    assert not _optuna.needs_drawn_point(CmaEsSampler())
    assert not _optuna.needs_drawn_point(TPESampler())


def test_partial_fixed_params_and_the_sampler_inside() -> None:
    inner = RandomSampler()
    middle = PartialFixedSampler({"x": 1, "y": 2}, inner)
    outer = PartialFixedSampler({"y": 3}, middle)
    assert _optuna.unwrap_partial_fixed(outer) is inner
    assert _optuna.unwrap_partial_fixed(inner) is inner
    assert _optuna.partial_fixed_params(inner) == {}
    assert _optuna.partial_fixed_params(outer) == {"x": 1, "y": 3}


def test_a_storage_never_has_the_number_of_one_that_is_gone() -> None:
    numbers = [_optuna.number_of(InMemoryStorage()) for _ in range(200)]
    assert len(set(numbers)) == 200
    storage = InMemoryStorage()
    assert _optuna.number_of(storage) == _optuna.number_of(storage)


def test_storages_in_memory_never_share_an_address() -> None:
    def addresses() -> set[str]:
        storages = [InMemoryStorage() for _ in range(200)]
        assert [_optuna.address_of(each) for each in storages] == [
            _optuna.address_of(each) for each in storages
        ]
        return {_optuna.address_of(each) for each in storages}

    earlier = addresses()
    gc.collect()
    # Some of the new ones have the `id` of one that is gone.
    assert earlier.isdisjoint(addresses())
