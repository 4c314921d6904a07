"""The fork server: what it loads, and how it is replaced."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib
import importlib.machinery
import os
from pathlib import Path
import select
import sys
import tempfile
import types
from typing import Any

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, Limits, QuotaPruner, TrialCrashed
from optuna_quota._isolation import forkserver, forkserver_client
from optuna_quota._isolation.channel import channel_pair
from optuna_quota._isolation.forkserver import SpawnRequest
from optuna_quota._isolation.forkserver_client import ForkServerClient, request_trial
from optuna_quota._isolation.launch import StartMethod
from optuna_quota._metering import metering_loop
from optuna_quota._records import read_record
from tests.isolation_tests.scripts import always, run_script
from tests.waiting import until


optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServerClient]:
    """The fork server of one test: its modules would slow down other tests' fork servers."""
    found = ForkServerClient()
    monkeypatch.setattr(forkserver_client, "_client", found)
    yield found
    found.close()


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a fork server finds."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def loaded(client: ForkServerClient) -> set[str]:
    assert client._server is not None
    return client._server.loaded


def quadratic(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
def test_nothing_is_written_where_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a read-only container, or on a full disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    client = ForkServerClient()
    try:
        client.prepare()
    finally:
        client.close()


@pytest.mark.slow
@pytest.mark.usefixtures("client")
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


@pytest.mark.slow
@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_module_to_preload_that_cannot_be_imported(
    method: StartMethod, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study()
    objective = isolated(quadratic, preload=["sckit_learn"], start_method=method)
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2
    said = [r.getMessage() for r in caplog.records if "preload" in r.getMessage()]
    assert len(said) == 1 and "No module named 'sckit_learn'" in said[0]


@pytest.mark.slow
def test_waiting_for_the_fork_server_is_no_time_of_the_trial(
    importable: Path, client: ForkServerClient
) -> None:
    # Otherwise the first trial's slow start would make its point look too slow.
    (importable / "long_to_load.py").write_text("import time\ntime.sleep(4)\n")
    client._wanted.update(dict.fromkeys(["long_to_load"]))
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time=3)))
    study.optimize(isolated(quadratic), n_trials=1)
    assert "long_to_load" in loaded(client)
    record = read_record(study.trials[0])
    assert record.outcome == "completed"
    assert record.usage.wall_time is not None
    assert record.usage.wall_time < 3


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_modules_of_loaded_packages_that_a_trial_imports_are_loaded_for_the_next() -> None:
    def objective(trial: optuna.Trial) -> float:
        was_loaded = "xml.dom.pulldom" in sys.modules
        importlib.import_module("xml.dom.pulldom")
        return float(was_loaded)

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["xml"]), n_trials=3)
    assert [trial.value for trial in study.trials] == [0.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("change", ["environ['MINE'] = '1'", "environ.update(MINE='1')"])
def test_modules_may_read_variables_that_a_trial_sets(change: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        exec(compile(change, __file__, "exec"), {"environ": os.environ})
        was_loaded = "xml.dom.pulldom" in sys.modules
        importlib.import_module("xml.dom.pulldom")
        return float(was_loaded)

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["xml"]), n_trials=2)
    assert [trial.value for trial in study.trials] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_a_lazy_module_costs_no_result() -> None:
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"No module can give {name}.")

    def objective(trial: optuna.Trial) -> float:
        lazy = Lazy("xml.lazy")
        lazy.__spec__ = importlib.machinery.ModuleSpec("xml.lazy", None)
        sys.modules["xml.lazy"] = lazy
        return 1.0

    study = optuna.create_study()
    study.optimize(isolated(objective, preload=["xml"]), n_trials=1)
    assert study.trials[0].value == 1.0


@pytest.mark.slow
def test_a_module_that_ends_the_fork_server_is_left_to_the_trials(
    importable: Path, client: ForkServerClient
) -> None:
    (importable / "ends_its_process.py").write_text("import os\nos._exit(3)\n")
    client.learn(["ends_its_process"])
    study = optuna.create_study()
    study.optimize(isolated(quadratic), n_trials=2)
    assert len(study.trials) == 2
    assert client._unsafe == {"ends_its_process"}


@pytest.mark.slow
def test_a_module_that_hangs_where_a_trial_imported_it_is_left_to_the_trials(
    importable: Path, monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    pid = importable / "pid"
    (importable / "hangs_elsewhere.py").write_text(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(forkserver_client, "LEARNED_TIME", 1.0)
    client.prepare()
    client.learn(["hangs_elsewhere"])
    study = optuna.create_study()
    study.optimize(isolated(quadratic), n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert client._unsafe == {"hangs_elsewhere"}
    number = int(pid.read_text())
    until(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie")


@pytest.mark.slow
def test_modules_that_start_threads_are_left_to_the_trials(
    importable: Path, client: ForkServerClient
) -> None:
    (importable / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    client._wanted.update(dict.fromkeys(["starts_a_thread"]))
    study = optuna.create_study()
    study.optimize(isolated(quadratic), n_trials=2)
    assert len(study.trials) == 2
    assert "starts_a_thread" in client._unsafe


@pytest.mark.slow
def test_a_package_full_of_threads_costs_one_fork_server(
    importable: Path, client: ForkServerClient
) -> None:
    package = importable / "full_of_threads"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "quiet.py").write_text("")
    for name in "abcd":
        (package / f"{name}.py").write_text(
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        )
    client._wanted.update(dict.fromkeys(["full_of_threads", "full_of_threads.quiet"]))
    client._wanted.update(dict.fromkeys([f"full_of_threads.{name}" for name in "abcd"]))
    client.launch(None).close()
    assert client._unsafe == {"full_of_threads.a"}
    assert {"full_of_threads", "full_of_threads.quiet"} <= loaded(client)
    assert "full_of_threads.b" not in loaded(client)


@pytest.mark.slow
def test_threads_that_end_before_a_fork_are_no_danger(client: ForkServerClient) -> None:
    # scipy alone brings no OpenBLAS, many of its modules do.
    pytest.importorskip("scipy.special._ufuncs")
    client._wanted.update(
        dict.fromkeys(["scipy", "scipy.special._ufuncs", "scipy.special._basic"])
    )
    client.launch(None).close()
    assert client._unsafe == set()


def test_a_lost_descriptor_is_no_trial() -> None:
    ours, theirs = channel_pair()
    theirs.send_descriptors([theirs.fileno()])
    before = os.listdir("/proc/self/fd")
    with contextlib.closing(ours), contextlib.closing(theirs):
        with pytest.raises(OSError):
            request_trial(ours, SpawnRequest(None))
        assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.slow
def test_files_of_the_user_are_not_taken_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    (tmp_path / "copy.py").write_text("raise RuntimeError('not a module')\n")
    monkeypatch.chdir(tmp_path)
    client.launch(None).close()


def test_the_reason_why_a_fork_server_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_quota._isolation import forkserver_client as module

    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    monkeypatch.setattr(module, "interpreter", lambda *_: command)
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="no luck today"):
        study.optimize(isolated(quadratic, start_method="spawn", on_crash="raise"), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


def test_an_import_that_hangs_in_the_fork_server_fails_the_trial(
    importable: Path, monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    (importable / "hangs.py").write_text(
        f"import os, time\nopen({str(importable / 'pid')!r}, 'w')"
        ".write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    client.prepare()
    monkeypatch.setattr(forkserver_client, "ANSWER_TIME", 2.0)
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="The import of 'hangs' has not ended within 2 s"):
        study.optimize(isolated(quadratic, preload=["hangs"], on_crash="raise"), n_trials=1)
    pid = int((importable / "pid").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


@pytest.mark.skipif(sys.platform != "linux", reason="fork servers are Linux's")
def test_a_large_request_to_a_fork_server_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(forkserver_client, "interpreter", lambda *_: command)
    monkeypatch.setattr(forkserver_client, "ANSWER_TIME", 0.5)
    names = [f"{'x' * 100}_{number}" for number in range(6000)]
    with pytest.raises(TimeoutError, match="The start of Python or of an import has not ended"):
        client.prepare(names)


def test_modules_may_take_long_together(
    importable: Path, monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    names = ["slow_one", "slow_two", "slow_three"]
    for name in names:
        (importable / f"{name}.py").write_text("import time\ntime.sleep(1.5)\n")
    client.prepare()
    monkeypatch.setattr(forkserver_client, "ANSWER_TIME", 3.0)
    client.prepare(names)
    assert set(names) <= loaded(client)


def test_a_module_that_another_imports_is_not_waited_for(
    importable: Path, monkeypatch: pytest.MonkeyPatch, client: ForkServerClient
) -> None:
    (importable / "outer.py").write_text("import inner\n")
    (importable / "inner.py").write_text("")
    client.prepare()
    waits, wait = [], forkserver_client._wait

    def counted(*arguments: Any) -> None:
        waits.append(arguments)
        wait(*arguments)

    monkeypatch.setattr(forkserver_client, "_wait", counted)
    client.prepare(["outer", "inner"])
    assert {"outer", "inner"} <= loaded(client)
    assert len(waits) == 2  # for the import of the first, and for the answer


def test_a_fork_server_is_no_part_of_a_trial_in_process() -> None:
    client = ForkServerClient()
    loop = metering_loop()
    try:
        client.launch(None).close()
        assert client._server is not None
        server = client._server.process.pid
        assert server in loop.trees.excluded_pids
        watch = loop.monitor((0, 0))
        target = loop.trees.of(watch)
        assert target is not None and server not in target.pids
        watch.close()
    finally:
        client.close()
        client.reset()
    assert server not in loop.trees.excluded_pids


OPTIONS = """
def objective(trial):
    assert False
    return 10 * sys.flags.optimize + sys.flags.bytes_warning + ("tracemalloc" in sys._xoptions)

if __name__ == "__main__":
    say(found=values(objective, n_trials=1))
"""


@pytest.mark.slow
def test_options_of_the_interpreter_hold_in_trials(tmp_path: Path) -> None:
    # Without `-O` the assertion would fail, in a trial only.
    options = ["-OO", "-b", "-Xtracemalloc=1", "-Ximporttime"]
    found = run_script(tmp_path, OPTIONS, *options, "script.py")["found"]
    assert found == always(22.0)


def test_an_interpreter_patched_by_gevent_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "_count_threads", lambda: 1)
    assert forkserver._can_fork()
    monkeypatch.setattr(select, "select", lambda *_: None)
    assert not forkserver._can_fork()
