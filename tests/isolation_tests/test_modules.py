"""Which modules of the study's process trials find loaded."""

from __future__ import annotations

from collections.abc import Iterator
import gc
import importlib
import json
import os
from pathlib import Path
import sys
import threading
import types

import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation import forkserver_client as clients
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.modules import (
    can_preload,
    is_installed,
    LateImports,
    module_frames,
    modules_to_preload,
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


def test_variables_that_libraries_set_are_none_of_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("__setitem__", "__delitem__"):
        monkeypatch.setattr(type(os.environ), name, getattr(type(os.environ), name))
    importlib.import_module("xml")
    monkeypatch.delitem(sys.modules, "xml.dom.pulldom", raising=False)
    imports = LateImports()
    importlib.import_module("xml.dom.pulldom")
    change = "environ.update(VARIABLE='1'); environ['VARIABLE'] = '2'; environ.pop('VARIABLE')"
    exec(compile(change, json.__file__, "exec"), {"environ": os.environ})
    assert "xml.dom.pulldom" in imports.found()
    exec(compile(change, __file__, "exec"), {"environ": os.environ})
    assert imports.found() == ()


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


# A deadlock of the interpreter, which no timeout of a test could end.
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
        # It would restore what the first one has set.
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
