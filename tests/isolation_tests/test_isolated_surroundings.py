"""An isolated trial finds what it would find in process: output, settings, modules."""

from __future__ import annotations

from collections.abc import Iterator
import logging
import multiprocessing
import os
from pathlib import Path
import sys
from typing import Any
import warnings

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import QuotaPruner
from optuna_quota import TrialCrashed
from optuna_quota._isolation import forkserver_client as clients
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.forkserver_client import ForkServerClient
from optuna_quota._isolation.modules import modules_to_preload
from optuna_quota._records import read_record


optuna.logging.set_verbosity(optuna.logging.WARNING)


def quadratic(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


def test_output_arrives_as_if_printed_here(capsys: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("to out", trial.number)  # noqa: T201
        print("to err", file=sys.stderr)  # noqa: T201
        sys.stdout.write("no newline")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    captured = capsys.readouterr()
    assert captured.out == "to out 0\nno newline"
    assert captured.err == "to err\n"


def test_output_of_children_goes_to_the_descriptors(capfd: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("from the trial", flush=True)  # noqa: T201
        os.system("echo from a shell")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    # The two come by different ways, as `sys.stdout` is not the descriptor under pytest.
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["from a shell", "from the trial"]


def test_logging_goes_to_the_handlers_here(caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> float:
        logger = logging.getLogger("mine.model")
        logger.debug("not asked for")
        logger.info("step %d", 3)
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("caught")
        return 0.0

    with caplog.at_level(logging.INFO, logger="mine"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    assert [r.getMessage() for r in caplog.records if r.name == "mine.model"] == [
        "step 3",
        "caught",
    ]
    assert "ValueError: inner" in caplog.text


def test_warnings_are_shown_here_and_filtered_as_here() -> None:
    def objective(trial: optuna.Trial) -> float:
        warnings.warn("take care", UserWarning, stacklevel=1)
        return 0.0

    with pytest.warns(UserWarning, match="take care"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="take care"):
            optuna.create_study().optimize(isolated(objective), n_trials=1)


def test_surroundings_are_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text("VALUE = 4.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWN_VARIABLE", "here")

    def objective(trial: optuna.Trial) -> float:
        import own_module  # type: ignore[import-not-found]  # written above

        assert os.environ["OWN_VARIABLE"] == "here"
        assert os.path.samefile(os.getcwd(), str(tmp_path))
        return float(own_module.VALUE)

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 4.0


def test_the_way_to_start_processes_is_the_same() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        study = optuna.create_study()
        study.optimize(
            isolated(lambda trial: float(multiprocessing.get_start_method() == "spawn")),
            n_trials=1,
        )
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert study.best_value == 1.0


def test_what_took_the_number_of_a_closed_stream_is_not_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("to nobody")  # noqa: T201
        trial.set_user_attr("none", sys.stdout is None)
        return float(os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev)

    study = optuna.create_study()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "__stdout__", None)
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 1.0
    assert study.best_trial.user_attrs["none"]


def test_random_numbers_differ_by_trial_and_follow_the_seed() -> None:
    import numpy as np

    def objective(trial: optuna.Trial) -> float:
        import random

        return float(np.random.random() + random.random())

    def values() -> list[float | None]:
        import random

        random.seed(3)
        np.random.seed(3)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(isolated(objective), n_trials=3)
        return [t.value for t in study.trials]

    first = values()
    assert len(set(first)) == 3
    assert values() == first


def test_large_libraries_can_be_loaded_before_a_fork() -> None:
    pytest.importorskip("sklearn.linear_model")

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("loaded", "sklearn.linear_model" in sys.modules)
        from sklearn.linear_model import LinearRegression

        return float(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]).coef_[0])

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["sklearn.linear_model"]), n_trials=2)
    assert [round(t.value or 0.0, 6) for t in study.trials] == [1.0, 1.0]
    assert all(t.user_attrs["loaded"] for t in study.trials)


@pytest.fixture
def _preloading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the template load what this process has imported, as it does outside of tests."""
    monkeypatch.setattr(clients, "modules_to_preload", modules_to_preload)
    monkeypatch.setattr(clients, "_client", None)
    yield
    fork_server_client().close()


@pytest.mark.usefixtures("_preloading")
def test_a_trial_finds_loaded_what_the_study_has_imported_and_nothing_else(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("known_here", "only_for_trials", "asked_for"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import known_here  # type: ignore[import-not-found]

    monkeypatch.setitem(globals(), "known_here", known_here)

    def objective(trial: optuna.Trial) -> float:
        names = ("known_here", "only_for_trials", "asked_for")
        trial.set_user_attr("loaded", [name for name in names if name in sys.modules])
        import only_for_trials  # type: ignore[import-not-found]

        return float(only_for_trials is None)

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["asked_for"]), n_trials=3)
    loaded = [t.user_attrs["loaded"] for t in study.trials]
    assert loaded == [["known_here", "asked_for"]] * 3
    sys.modules.pop("known_here")


@pytest.mark.usefixtures("_preloading")
def test_a_module_that_was_edited_is_loaded_anew(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edited.py").write_text("def value(): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import edited  # type: ignore[import-not-found]

    monkeypatch.setitem(globals(), "edited", edited)
    study = optuna.create_study()
    study.optimize(isolated(lambda trial: edited.value()), n_trials=1)
    (tmp_path / "edited.py").write_text("def value(): return 22.0\n")
    study.optimize(isolated(lambda trial: edited.value()), n_trials=1)
    assert [t.value for t in study.trials] == [1.0, 22.0]
    sys.modules.pop("edited")


def test_waiting_for_the_template_is_no_time_of_the_trial(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else a point would be taken to need more time than its limit, only since it came first.
    (tmp_path / "long_to_load.py").write_text("import time\ntime.sleep(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fork_server_client()._wanted.update(dict.fromkeys(["long_to_load"]))
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=3)))
    study.optimize(isolated(quadratic), n_trials=1)
    assert "long_to_load" in fork_server_client()._loaded
    record = read_record(study.trials[0])
    assert record.outcome == "completed"
    assert record.usage.wall_time is not None
    assert record.usage.wall_time < 3


def test_modules_that_start_threads_are_left_to_the_trials(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    client = fork_server_client()
    client._wanted.update(dict.fromkeys(["starts_a_thread"]))
    try:
        study = optuna.create_study()
        study.optimize(isolated(quadratic), n_trials=2)
        assert len(study.trials) == 2
        assert "starts_a_thread" in client._unsafe
    finally:
        client._wanted.pop("starts_a_thread")


def test_a_package_full_of_threads_costs_one_template(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "full_of_threads"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "quiet.py").write_text("")
    for name in "abcd":
        (package / f"{name}.py").write_text(
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    client = ForkServerClient()
    client._wanted.update(dict.fromkeys(["full_of_threads", "full_of_threads.quiet"]))
    client._wanted.update(dict.fromkeys([f"full_of_threads.{name}" for name in "abcd"]))
    try:
        client.launch(None).close()
        assert client._unsafe == {"full_of_threads.a"}
        assert {"full_of_threads", "full_of_threads.quiet"} <= client._loaded.keys()
        assert "full_of_threads.b" not in client._loaded
    finally:
        client.close()
        client._errors.close()


def test_threads_that_end_before_a_fork_are_no_danger() -> None:
    # scipy alone brings no OpenBLAS, many of its modules do.
    pytest.importorskip("scipy.special._ufuncs")
    client = ForkServerClient()
    client._wanted.update(
        dict.fromkeys(["scipy", "scipy.special._ufuncs", "scipy.special._basic"])
    )
    try:
        client.launch(None).close()
        assert client._unsafe == set()
    finally:
        client.close()
        client._errors.close()


def test_what_a_template_said_is_heard_when_it_ends_before_all_was_sent() -> None:
    import pickle
    import socket

    from optuna_quota._isolation.forkserver import UnsafeModule
    from optuna_quota._isolation.forkserver_client import _unread

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(pickle.dumps(UnsafeModule("starts_threads")))
    theirs.close()
    with ours, pytest.raises(OSError):
        try:
            ours.send(b"too late")
        finally:
            assert pickle.loads(_unread(ours)) == UnsafeModule("starts_threads")
            assert _unread(ours) == b""


def test_files_of_the_user_are_not_taken_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy.py").write_text("raise RuntimeError('not a module')\n")
    monkeypatch.chdir(tmp_path)
    client = ForkServerClient()
    try:
        client.launch(None).close()
    finally:
        client.close()
        client._errors.close()


def test_a_template_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_quota._isolation import forkserver_client as module

    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    monkeypatch.setattr(module, "interpreter", lambda *_: command)
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="no luck today"):
        study.optimize(isolated(quadratic, start_method="spawn", on_crash="raise"), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
