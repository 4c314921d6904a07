"""What a script has changed in modules, as its trials find it, and what trials change of it."""

from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
import sys
import threading
import types
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation.module_state import (
    changed_variables,
    describe_lost_changes,
    is_plain,
    plain_attributes,
    read_module_state,
    read_variables,
    restore_module_state,
    set_attributes,
)
from tests.isolation_tests.scripts import METHODS, run_script


class Number(int):
    pass


class Settings:
    """An object of a user's module; found by pickle in this one."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, True),
        (1.5, True),
        ("text", True),
        ([1, {"a": (2, {3})}], True),
        (Number(3), False),
        (print, False),
        ([print], False),
        ({"a": object()}, False),
        (np.float64(1), False),
        ([[[[1]]]], True),
        ({"a": {"b": {"c": {"d": 1}}}}, True),
        ({"a": {"b": {"c": {"d": [1]}}}}, False),
        ([[[[[1]]]]], False),
        (list(range(200)), True),
        (list(range(201)), False),
    ],
)
def test_is_plain(value: Any, expected: bool) -> None:
    assert is_plain(value) is expected


def test_plain_attributes_of_classes_and_functions() -> None:
    def function() -> None: ...

    vars(function).update(calls=3, cache={}, _private=1, helper=print)
    assert plain_attributes(function) == {"calls": 3, "cache": {}}

    class Config:
        epochs = 3
        _seen = 4

        def method(self) -> None: ...

    assert plain_attributes(Config) == {"epochs": 3}
    assert plain_attributes(3) == {}


def make(**values: Any) -> types.ModuleType:
    module = types.ModuleType("config")
    vars(module).update(values)
    for value in values.values():
        if isinstance(value, type) and value.__module__ == __name__:
            value.__module__ = "config"
    return module


def carried(here: types.ModuleType, there: types.ModuleType) -> types.ModuleType:
    state = read_module_state([here])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "config", there)
        restore_module_state(state)
    return there


def test_globals_are_set_and_added() -> None:
    here = make(SCALE=10, NAMES=("a",), ADDED=True)
    assert vars(carried(here, make(SCALE=1, NAMES=(), LEFT=4))).items() >= {
        ("SCALE", 10),
        ("NAMES", ("a",)),
        ("ADDED", True),
        ("LEFT", 4),
    }


def test_a_value_of_another_type_is_not_the_same() -> None:
    assert type(carried(make(X=1.0), make(X=1)).X) is float
    assert carried(make(X=True), make(X=1)).X is True


@pytest.mark.parametrize(
    ("before", "after"), [({"a": 1, "b": 2}, {"a": 3}), ([1, 2], [3]), ({1, 2}, {3})]
)
def test_containers_are_changed_in_place(before: Any, after: Any) -> None:
    carried(make(X=after), make(X=before))
    assert before == after


def test_objects_are_changed_in_place() -> None:
    before = Settings(epochs=1, old=True)
    carried(make(SETTINGS=Settings(epochs=3)), make(SETTINGS=before))
    assert vars(before) == {"epochs": 3}


class AttributeDict(dict[str, Any]):
    """As configuration libraries have it: an unknown attribute is a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 can't pickle them: no __getstate__")
def test_dictionaries_with_attributes_are_changed_in_place() -> None:
    before = AttributeDict(train=AttributeDict(lr=1.0))
    carried(make(CFG=AttributeDict(train=AttributeDict(lr=0.1))), make(CFG=before))
    assert before.train.lr == 0.1 and type(before.train) is AttributeDict


def test_attributes_of_classes_are_set() -> None:
    class Here:
        epochs = 3
        added = "x"

    class There:
        epochs = 1

    carried(make(Config=Here), make(Config=There))
    assert There.epochs == 3 and There.added == "x"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        open,
        np.zeros(10),
        Settings(data=[0] * 10_000),
        Settings(lock=open),
        int,
        AttributeDict(data=np.zeros(10)),
    ],
    ids=["lock", "function", "array", "large", "refers to code", "class of another", "held data"],
)
def test_other_values_are_left_to_the_module(value: Any) -> None:
    assert carried(make(X=value), make(X="its own")).X == "its own"


def test_large_data_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_module_state([make(X=list(range(10**6)), Y=np.zeros(10**6))]) == {}


def test_read_only_attributes_are_left() -> None:
    class Fixed:
        @property
        def epochs(self) -> int:
            return 1

    owner = Fixed()
    set_attributes(owner, {"epochs": 3})
    assert owner.epochs == 1
    there = make(Config=3, SETTINGS=None)
    here = make(Config=type("Config", (), {"epochs": 3}), SETTINGS=Settings(epochs=2))
    carried(here, there)
    assert there.Config == 3 and there.SETTINGS.epochs == 2


# What a trial changes is lost, with a warning.


def changed_by(objective: Callable[[], Any]) -> tuple[str, ...]:
    variables = read_variables(objective)
    objective()
    return changed_variables(variables)


class Tuning:
    def __init__(self) -> None:
        self.history: list[float] = []
        self.best: float | None = None
        self.model: object = None
        self.name = "tuning"
        self._calls = 0

    def objective(self) -> None:
        self.history.append(1.0)
        self.best = 1.0
        self.model = object()
        self.name = "tun" + "ing"
        self._calls += 1
        self.trial = object()


class Odd:
    @property
    def __class__(self) -> Any:  # a lazy object, which may load anything
        raise RuntimeError

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_attributes_of_the_objectives_object() -> None:
    tuning = Tuning()
    expected = ("Tuning.history", "Tuning.best")
    assert changed_by(tuning.objective) == expected
    assert changed_by(lambda: tuning.objective()) == expected[:1]  # the best stays the best


def test_variables_of_a_closure() -> None:
    count, best, unset = 0, None, math.nan
    values, seen, by_name, same = [1.0], {1}, {"value": math.inf}, [0]
    large, odd = list(range(1000)), Odd()

    def objective() -> None:
        nonlocal count, best
        count += 1
        best = object()
        values[0] = 2.0
        seen.add(2)
        by_name["value"] = 3.0
        same[0] = len(large) - 1000
        assert odd is not unset
        if count > 1:
            values.append(later)

    changed = changed_by(objective)
    later = 1  # its cell was empty
    assert set(changed) == {"count", "best", "values", "seen", "by_name"}


def test_what_an_objective_frees_is_not_kept() -> None:
    freed = []

    class Data:
        def __del__(self) -> None:
            freed.append(True)

    data: Data | None = Data()

    def objective() -> None:
        nonlocal data
        data = None
        assert freed

    assert set(changed_by(objective)) == {"data", "freed"}


def test_the_warning() -> None:
    assert describe_lost_changes(0, ["a"]).startswith("Trial 0 changed `a` of the script. What")
    assert "changed `a`, `b` and `c` of" in describe_lost_changes(0, ["a", "b", "c"])


@pytest.mark.parametrize("method", METHODS[:2])
def test_it_is_logged_once_a_study(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    results = []

    def objective(trial: optuna.Trial) -> float:
        results.append(trial.number)
        return 1.0

    def clean(trial: optuna.Trial) -> float:
        return float(len(results))

    for function, warnings in ((objective, 1), (clean, 0)):
        caplog.clear()
        study = optuna.create_study()
        study.optimize(isolated(function, start_method=method), n_trials=2)
        found = [r.getMessage() for r in caplog.records if "changed" in r.getMessage()]
        assert len(found) == warnings, found
        assert all("Trial 0 changed `results` of the script." in text for text in found)
    assert not results


def test_globals_of_a_script_and_of_its_modules(tmp_path: Path) -> None:
    (tmp_path / "kept.py").write_text("LOG = []\nlazy = None\n")
    source = """
import kept
optuna.logging.set_verbosity(optuna.logging.WARNING)
count, best, _cache = 0, None, {}

def objective(trial):
    global count, best
    import json as found
    count, best, kept.lazy = count + 1, trial.number, found
    _cache[trial.number] = 1
    kept.LOG.append(count)
    return 1.0

say(found=values(objective, methods=METHODS[:1]))
"""
    run_script(tmp_path, source)
    errors = (tmp_path / "errors.txt").read_text()
    assert "Trial 0 changed `best`, `count` and `LOG` of the script." in errors
