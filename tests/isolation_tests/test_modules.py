"""Which modules of the study's process trials find loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import sys

import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation import forkserver_client as clients
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.modules import can_preload, modules_to_preload


def test_modules_that_can_be_loaded_before_a_fork() -> None:

    names = ["numpy", "json", "__main__", "jax", "no_such_module", __name__]
    assert can_preload(names) == ["numpy", "json", __name__]


def test_modules_that_trials_find_loaded() -> None:
    named = modules_to_preload(everything=False)
    # This module's imports, with the module itself, but not what only runs the tests.
    assert {"optuna", __name__} <= set(named)
    assert not {"pytest", "_pytest.python", "optuna_quota"} & set(named)
    assert set(named) <= set(modules_to_preload(everything=True))


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
