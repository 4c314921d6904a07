"""What an isolated trial changes of its script's variables is lost, with a warning."""

from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation.lost_changes import (
    changed_variables,
    describe_lost_changes,
    read_variables,
)
from tests.isolation_tests.scripts import METHODS, run_script


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
