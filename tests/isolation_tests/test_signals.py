"""Signals to all processes of a job reach the objective, and no helper dies of them."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
from pathlib import Path
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any
from unittest.mock import Mock
import weakref

import optuna
from optuna.trial import TrialState
import psutil
import pytest

from optuna_quota import isolated, LimitBreached, Limits, Quota, QuotaSampler
from optuna_quota._isolation import linux
from optuna_quota._isolation.channel import Channel, TrialConnections
from optuna_quota._isolation.forkserver_client import fork_server_client
from optuna_quota._isolation.launch import StartMethod
from optuna_quota._isolation.signals import BEGIN, PoliteStop, STOP_SIGNAL
from optuna_quota._records import read_record
from optuna_quota._usage import Breach
from tests.isolation_tests.scripts import journal
from tests.isolation_tests.trials import needs_supervisor


pytestmark = needs_supervisor

METHODS: list[StartMethod] = ["forkserver", "spawn", "fork"]
SENT = ["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGTERM", "SIGALRM", "SIGCONT"]


@pytest.mark.parametrize("ending", [LimitBreached, optuna.TrialPruned, KeyboardInterrupt])
def test_the_polite_stop_raises_nothing_in_a_clean_up(ending: type[BaseException]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = PoliteStop(None)
    try:
        with pytest.raises(ending, match="first"):
            try:
                raise ending("first")
            finally:
                try:
                    raise OSError("of the clean-up")
                except OSError:
                    signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(LimitBreached):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_trial_that_is_to_begin_and_to_stop_at_once_stops() -> None:
    # Both were sent before it ran again, as on a busy host or after SIGSTOP.
    link, trial_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trial_link.setblocking(False)
    before = signal.getsignal(STOP_SIGNAL)
    stop = PoliteStop(trial_link)
    breach = Breach("wall_time", 1.0, 1.5, 1.5)
    try:
        for message in (BEGIN, pickle.dumps(breach)):
            link.send(message)
        with pytest.raises(LimitBreached, match="Time limit"):
            signal.raise_signal(STOP_SIGNAL)
    finally:
        signal.signal(STOP_SIGNAL, before)
        link.close()
        trial_link.close()
    assert stop.requested


def test_the_stack_of_signal_handlers_is_in_use_until_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[bool] = []
    linux._signal_stack = ctypes.create_string_buffer(8)
    former = weakref.ref(linux._signal_stack)

    def sigaltstack(*_: object) -> int:
        kept.append(former() is not None)
        return 0

    monkeypatch.setattr(linux, "_libc", Mock(sigaltstack=sigaltstack))
    try:
        linux.enlarge_signal_stack()
    finally:
        linux._signal_stack = None
    assert kept == [True]


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written.")


def signal_all(number: int, *more: int) -> None:
    """Signal this process, all that descends from it, and more, as a job step's do."""
    me = psutil.Process()
    pids = {me.pid, *more, *(child.pid for child in me.children(recursive=True))}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_only_the_objective_gets_signals_to_the_job(tmp_path: Path, method: StartMethod) -> None:
    folder = str(tmp_path)

    def objective(trial: optuna.Trial) -> float:
        heard: list[str] = []
        for name in SENT:
            signal.signal(getattr(signal, name), lambda n, _: heard.append(signal.Signals(n).name))
        # Under spawn, they descend from no process that lives.
        Path(folder, "new").write_text(f"{os.getpid()} {os.getppid()}")
        Path(folder, "new").rename(Path(folder, str(trial.number)))
        for _ in range(1000):
            if set(heard) == set(SENT):
                break
            time.sleep(0.01)
        trial.set_user_attr("heard", sorted(set(heard)))
        return 1.0

    def send() -> None:
        for number in range(2):
            wait_for(tmp_path / str(number))
            pids = [int(pid) for pid in (tmp_path / str(number)).read_text().split()]
            for name in SENT:
                signal_all(number_of(name), *pids)

    here: list[int] = []
    before = {n: signal.signal(n, lambda n, _: here.append(n)) for n in map(number_of, SENT)}
    sender = threading.Thread(target=send, daemon=True)
    try:
        study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=9)))
        sender.start()
        study.optimize(isolated(objective, start_method=method), n_trials=2)
        sender.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [t.user_attrs.get("heard") for t in study.trials] == [sorted(SENT)] * 2
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert set(here) == {number_of(name) for name in SENT}


def number_of(name: str) -> int:
    return int(getattr(signal, name))


def test_helper_processes_survive_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("pids", [os.getpid(), os.getppid()])
        return 1.0

    # Its stack for handlers is a small one.
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    # The one of earlier tests may have trials that are still ending.
    fork_server_client().reset()
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    fork_server = fork_server_client()._server
    assert fork_server is not None
    server = fork_server.process
    # The next trial's process and its supervisor; those of the first one may still be ending.
    ended = study.trials[0].user_attrs["pids"]
    waiting: list[psutil.Process] = []
    while len(waiting) < 2:
        children = psutil.Process(server.pid).children(recursive=True)
        waiting = [child for child in children if child.pid not in ended]
    helpers = [psutil.Process(server.pid), *waiting]
    for name in (*SENT, "SIGINT", "SIGQUIT", "SIGTSTP"):
        for helper in helpers:
            helper.send_signal(number_of(name))
    time.sleep(0.1)
    assert server.poll() is None
    for helper in helpers:
        assert helper.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    study.optimize(isolated(objective), n_trials=1)
    assert [trial.value for trial in study.trials] == [1.0, 1.0]
    assert set(study.trials[1].user_attrs["pids"]) == {process.pid for process in waiting}


class SlowToArrive:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return arrive, (self.folder,)

    def __call__(self, trial: optuna.Trial) -> float:
        return 1.0


def arrive(folder: str) -> SlowToArrive:
    Path(folder, "arriving").touch()
    time.sleep(0.5)
    return SlowToArrive(folder)


def test_a_signal_before_the_objective_begins_does_no_harm(tmp_path: Path) -> None:
    def send() -> None:
        wait_for(tmp_path / "arriving")
        signal_all(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Its module is imported in the trial's process, as tests are no script.
    study = optuna.create_study()
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    study.optimize(isolated(SlowToArrive(str(tmp_path))), n_trials=1)
    sender.join()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert study.trials[0].value == 1.0, read_record(study.trials[0]).reason


DISPOSITIONS = """
    import multiprocessing, signal, sys
    import optuna
    from optuna_quota import isolated

    def look():
        found = {}
        for number in signal.valid_signals():
            # `None` where it was set from C, as faulthandler's are.
            handler = signal.getsignal(number)
            if isinstance(handler, signal.Handlers):
                handler = int(handler)
            found[int(number)] = getattr(handler, "__name__", handler)
        return found

    def tell(queue):
        queue.put(look())

    def objective(trial):
        trial.set_user_attr("found", {str(k): v for k, v in look().items()})
        return 0.0

    if __name__ == "__main__":
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=tell, args=(queue,))
        child.start()
        usual = queue.get()
        child.join()
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=sys.argv[1]), n_trials=2)
        for trial in study.trials:
            found = {int(k): v for k, v in trial.user_attrs["found"].items()}
            print({k: (usual[k], found[k]) for k in usual if usual[k] != found[k]})
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_objective_finds_the_dispositions_of_an_ordinary_child(
    tmp_path: Path, method: StartMethod
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISPOSITIONS))

    def under_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    done = subprocess.run(
        [sys.executable, str(script), method],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=under_nohup,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # The stop at a limit has its own signal.
    own = {STOP_SIGNAL}
    lines = [eval(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2, done.stderr
    assert [set(line) - own for line in lines] == [set(), set()], lines


def test_signals_that_a_script_handles_when_it_is_imported_stay_handled() -> None:
    class Handling:
        def __reduce__(self) -> Any:
            return signal.signal, (signal.SIGUSR1, signal.SIG_IGN)

    handling = Handling()

    def objective(trial: optuna.Trial) -> float:
        assert handling is not None
        return float(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)

    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_signals_at_which_a_script_shows_its_stacks_do_so_in_its_trials(
    method: StartMethod, capfd: pytest.CaptureFixture[str]
) -> None:
    def wait_for_the_signal(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGUSR2)
        return 1.0

    faulthandler.register(signal.SIGUSR2, file=2)
    try:
        study = optuna.create_study()
        study.optimize(isolated(wait_for_the_signal, start_method=method), n_trials=1)
    finally:
        faulthandler.unregister(signal.SIGUSR2)
    assert study.trials[0].value == 1.0, read_record(study.trials[0]).reason
    assert "in wait_for_the_signal" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_signals_that_a_script_waits_for_are_blocked_in_its_trials(method: StartMethod) -> None:
    def objective(trial: optuna.Trial) -> float:
        for number in (signal.SIGUSR1, signal.SIGALRM):
            os.kill(os.getpid(), number)
        trial.set_user_attr("pending", sorted(signal.sigpending()))
        time.sleep(60)
        return 1.0

    # The signal that stops a trial is never blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        study = optuna.create_study()
        limited = isolated(
            objective, start_method=method, limits=Limits(wall_time="3s"), grace_period=20
        )
        study.optimize(limited, n_trials=1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    attributes = study.trials[0].user_attrs
    assert attributes["pending"] == sorted([signal.SIGUSR1, signal.SIGALRM])
    assert attributes["quota:wall_time"] < 15


INTERRUPTED = """
    import os, signal, sys, time
    from pathlib import Path
    import optuna
    from optuna_quota import isolated, LimitBreached, Limits, Quota, QuotaSampler
    from tests.isolation_tests.scripts import journal

    # A shell's background job, as this suite may be one, is started deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, case = Path(sys.argv[1]), sys.argv[2]

    def objective(trial):
        try:
            Path(folder, "pid").write_text(str(os.getpid()))
            Path(folder, "pid").rename(folder / "started")
            if case == "calling":
                while True:
                    trial.set_user_attr("now", time.time())
            time.sleep(60)
        except KeyboardInterrupt:
            Path(folder, "saving").touch()
            time.sleep(0.2 if case != "slow" else 60)
            trial.set_user_attr("checkpoint", "here")
            Path(folder, "saved").touch()
            if case == "swallows":
                return 1.0
            raise

    study = optuna.create_study(
        storage=journal(folder) if case != "calling" else f"sqlite:///{folder}/study.db",
        study_name="s",
        sampler=QuotaSampler(quota=Quota(n_trials=9)) if case != "plain" else None,
    )
    grace = {"none": 0.0, "hurried": 1.0}.get(case, 20.0)
    if case == "hurried":
        case = "slow"
    study.optimize(isolated(objective, grace_period=grace), n_trials=3 - 2 * (case == "swallows"))
"""


def start_interrupted(folder: Path, case: str) -> subprocess.Popen[str]:
    """Start the script that is interrupted, and wait until its objective has begun."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), case],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(folder / "started")
    return process


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "quota", "calling", "slow", "hurried", "none"])
def test_an_interrupt_gives_the_trial_its_grace_period(tmp_path: Path, case: str) -> None:
    process = start_interrupted(tmp_path, case)
    trial_process = psutil.Process(int((tmp_path / "started").read_text()))
    if case == "calling":
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    if case == "slow":
        # A second one ends it at once.
        wait_for(tmp_path / "saving")
        os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not trial_process.is_running()
    # In the midst of a call, a database is the harder case.
    storage = journal(tmp_path) if case != "calling" else f"sqlite:///{tmp_path}/study.db"
    study = optuna.load_study(storage=storage, study_name="s")
    (trial,) = study.trials
    record = read_record(trial)
    assert trial.state == TrialState.FAIL
    assert record.outcome == "failed" and "The study was interrupted" in (record.reason or "")
    saved = case not in ("slow", "hurried", "none")
    assert (tmp_path / "saved").exists() == saved
    assert (trial.user_attrs.get("checkpoint") == "here") == saved
    assert ("was killed" in (record.reason or "")) == (case in ("hurried", "none"))
    assert ("Another Ctrl-C kills it" in errors) == (case != "none")


@pytest.mark.slow
def test_an_objective_that_takes_an_interrupt_may_return_a_value(tmp_path: Path) -> None:
    process = start_interrupted(tmp_path, "swallows")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    (trial,) = optuna.load_study(storage=journal(tmp_path), study_name="s").trials
    assert trial.value == 1.0 and trial.user_attrs["checkpoint"] == "here"
    assert read_record(trial).outcome == "completed"


@pytest.mark.slow
def test_an_interrupt_of_all_processes_is_raised_once(tmp_path: Path) -> None:
    process = start_interrupted(tmp_path, "quota")
    study_process = psutil.Process(process.pid)
    for each in [*study_process.children(recursive=True), study_process]:
        each.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_an_interrupt_while_a_trial_is_started_harms_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optuna_quota._isolation import forkserver_client as module

    study = optuna.create_study()
    order = module.request_trial

    def interrupted(server: Channel, request: Any, descriptors: Any = ()) -> TrialConnections:
        server.send(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "request_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(isolated(lambda trial: 1.0), n_trials=1)
    monkeypatch.setattr(module, "request_trial", order)
    study.optimize(isolated(lambda trial: 2.0), n_trials=2)
    assert [trial.value for trial in study.trials] == [None, 2.0, 2.0]
    record = read_record(study.trials[0])
    assert record.reason == "The study was interrupted (KeyboardInterrupt)."
