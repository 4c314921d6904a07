"""Which modules of the study's process trials find loaded."""

from __future__ import annotations

from collections.abc import Iterator
import gc
from pathlib import Path
import sys
import threading
import types
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation import forkserver_client as clients
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.modules import (
    can_preload,
    is_installed,
    is_plain,
    module_frames,
    modules_to_preload,
    plain_attributes,
    read_module_state,
    restore_module_state,
    set_attributes,
)
from tests.isolation_tests.scripts import run_python


def test_modules_that_can_be_loaded_before_a_fork() -> None:

    names = ["numpy", "json", "__main__", "jax", "no_such_module", __name__]
    assert can_preload(names) == ["numpy", "json", __name__]


def test_modules_that_trials_find_loaded() -> None:
    named = modules_to_preload(everything=False)
    # This module's imports, with the module itself, but not what only runs the tests.
    assert {"optuna", __name__} <= set(named)
    assert not {"pytest", "_pytest.python", "optuna_quota"} & set(named)
    assert set(named) <= set(modules_to_preload(everything=True))


def test_libraries_of_pip_target_are_installed_and_an_application_beside_them_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a container, libraries are often put where the application is, with PYTHONPATH=/app.
    for name in ("target", "app", "project"):
        (tmp_path / name).mkdir()
    for name in ("target", "app"):
        info = tmp_path / name / "library-1.0.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(
            "library/__init__.py,sha256=a,1\nlibrary/part.py,,\nmodule.py,,\n../../bin/run,,\n"
        )
    folders = {name: str(tmp_path / name) for name in ("app", "project", "target")}
    monkeypatch.setattr(sys, "path", [folders["app"], *folders.values(), *sys.path])
    files = ("library/part.py", "module.py", "config.py", "library_of_app.py", "bin/run.py")
    found = {(n, f) for n in folders for f in files if is_installed(f"{folders[n]}/{f}")}
    assert found == {(n, f) for n in ("target", "app") for f in ("library/part.py", "module.py")}


# The interpreter's own lock, which no timeout of a test could end.
COLLECT_WITHIN = """
import gc, threading, time
from optuna_quota._isolation.modules import module_frames

class Node: pass

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
for number in range(100):
    gc.set_threshold(100_000)
    gc.collect()
    for _ in range(10):
        node = Node()
        node.itself, node.local = node, threading.local()
        node.local.x = 1
    gc.set_threshold(gc.get_count()[0] + number % 20)
    list(module_frames())
"""


def test_frames_are_found_while_studies_are_garbage(tmp_path: Path) -> None:
    run_python(tmp_path, "-c", COLLECT_WITHIN)


@pytest.mark.parametrize("is_on", [True, False])
def test_to_find_frames_leaves_garbage_collection_as_it_was(
    is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    within, go_on, asked, first_is_done = (threading.Event() for _ in range(4))
    current_frames, isenabled = sys._current_frames, gc.isenabled

    def look_slowly() -> dict[int, types.FrameType]:
        if threading.current_thread() is first:
            within.set()
            assert go_on.wait(60)
        return current_frames()

    def ask() -> bool:
        found = isenabled()
        if threading.current_thread() is second:
            asked.set()
            assert first_is_done.wait(60)
        return found

    def look() -> None:
        list(module_frames())
        first_is_done.set()

    first, second = (threading.Thread(target=look) for _ in range(2))
    monkeypatch.setattr(sys, "_current_frames", look_slowly)
    monkeypatch.setattr(gc, "isenabled", ask)
    (gc.enable if is_on else gc.disable)()
    try:
        first.start()
        assert within.wait(60)
        second.start()
        # It would take what the first has set for what was there, and leave it so.
        asked_within = asked.wait(0.5)
        go_on.set()
        first.join(60)
        second.join(60)
        assert isenabled() == is_on
        assert not asked_within
    finally:
        go_on.set()
        gc.enable()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder of modules that are preloaded as outside of tests; no others are."""

    def modules_here(*, everything: bool) -> list[str]:
        found = modules_to_preload(everything=everything)
        files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in found}
        return [name for name, file in files.items() if file.startswith(str(tmp_path))]

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(clients, "modules_to_preload", modules_here)
    monkeypatch.setattr(clients, "_client", None)
    yield tmp_path
    fork_server_client().close()


@pytest.mark.slow
def test_trials_find_loaded_what_the_study_has_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("known_here", "only_for_trials", "asked_for"):
        (folder / f"{name}.py").write_text("")
    import known_here  # type: ignore[import-not-found]

    monkeypatch.setitem(globals(), "known_here", known_here)

    def objective(trial: optuna.Trial) -> float:
        names = ("known_here", "only_for_trials", "asked_for")
        trial.set_user_attr("loaded", [name for name in names if name in sys.modules])
        import only_for_trials  # type: ignore[import-not-found]

        return float(only_for_trials is None)

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["asked_for"]), n_trials=2)
    loaded = [t.user_attrs["loaded"] for t in study.trials]
    assert loaded == [["known_here", "asked_for"]] * 2
    sys.modules.pop("known_here")


@pytest.mark.slow
def test_a_module_that_was_edited_is_loaded_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "edited.py").write_text("def value(): return 1.0\n")
    import edited  # type: ignore[import-not-found]

    monkeypatch.setitem(globals(), "edited", edited)
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: edited.value()), n_trials=1)
    (folder / "edited.py").write_text("def value(): return 22.0\n")
    study.optimize(isolated(lambda trial: edited.value()), n_trials=1)
    assert [t.value for t in study.trials] == [1.0, 22.0]
    sys.modules.pop("edited")


# Changes that a script has made to its own modules are made in the trial's process.


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
