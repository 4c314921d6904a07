"""A study that is stopped and continued loses no result, and its trials no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time

import optuna
from optuna.trial import FrozenTrial, TrialState
import psutil
import pytest

from optuna_quota import isolated, Limits, QuotaPruner
from optuna_quota._records import read_record
from tests.isolation_tests.scripts import journal
from tests.isolation_tests.trials import needs_supervisor


pytestmark = [needs_supervisor, pytest.mark.slow]

SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    import optuna
    from optuna_quota import isolated, LimitBreached, Limits, Quota, QuotaPruner, QuotaSampler
    from tests.isolation_tests.scripts import journal

    folder, where = Path(sys.argv[1]), sys.argv[2]
    study_pid = os.getpid()
    QUOTA = Quota(trial_time="1h", wall_time="1h")

    def mark(name):
        Path(folder, name + ".new").write_text(str(os.getpid()))
        Path(folder, name + ".new").rename(folder / name)

    def work(seconds):
        # In steps, so that a stop of this process can't pass unseen as one long sleep does.
        for _ in range(int(seconds / 0.05)):
            time.sleep(0.05)

    BODY

    study = optuna.create_study(
        storage=journal(folder),
        study_name="s",
        sampler=QuotaSampler(quota=QUOTA, lease=1) if "quota" in where else None,
        pruner=QuotaPruner(limits=Limits(wall_time=LIMIT)),
    )
    run = objective if "here" in where else isolated(objective, grace_period=2.0)
    study.optimize(run, n_trials=1)
"""


class Script:
    """A study in a process and a session of its own."""

    def __init__(self, folder: Path, body: str, where: str, limit: float) -> None:
        self.folder = folder
        code = textwrap.dedent(SCRIPT).replace("LIMIT", str(limit))
        script = folder / "script.py"
        script.write_text(code.replace("BODY", textwrap.dedent(body)))
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder), where],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, name: str) -> int:
        for _ in range(3000):
            if (self.folder / name).exists():
                return int((self.folder / name).read_text())
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        raise AssertionError(f"{name} was not written.")

    def end(self) -> FrozenTrial:
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        study = optuna.load_study(storage=journal(self.folder), study_name="s")
        return study.trials[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, str, float], Script]]:
    started: list[Script] = []

    def make(body: str, where: str, limit: float) -> Script:
        started.append(Script(tmp_path, body, where, limit))
        return started[-1]

    yield make
    for script in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(script.process.pid, signal.SIGCONT)
        script.process.kill()
        script.process.communicate()


WORKING = """
    def objective(trial):
        trial.should_prune()  # in process, the pruner meters from here on
        mark("started")
        work(0.8)
        trial.should_prune()
        trial.set_user_attr("done", True)
        return 1.0
"""


class Pause:
    """A study and its trial, stopped as soon as the trial runs."""

    def __init__(self, folder: Path, where: str, whom: str) -> None:
        self.script = Script(folder, WORKING, where, 3.0)
        self._whom = whom
        self._stopped: list[psutil.Process] = []

    def begin(self) -> None:
        self.trial = psutil.Process(self.script.wait_for("started"))
        study = psutil.Process(self.script.process.pid)
        everything = self._whom == "all"
        self._stopped = [study, *study.children(recursive=True)] if everything else [study]
        self._send(signal.SIGSTOP)
        self._since = time.monotonic()

    def _send(self, number: int) -> None:
        if self._whom == "group":
            os.killpg(self.script.process.pid, number)
            return
        for process in self._stopped if number == signal.SIGSTOP else reversed(self._stopped):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def state_after(self, seconds: float) -> str:
        """Return the state of the trial's process after so many seconds of the pause."""
        time.sleep(max(0.0, self._since + seconds - time.monotonic()))
        return self.trial.status()

    def end(self) -> FrozenTrial:
        self._send(signal.SIGCONT)
        return self.script.end()


CASES = [
    ("process", "group"),
    ("process quota", "study"),
    ("process quota", "all"),
    ("here", "study"),
    ("here quota", "all"),
]


@pytest.fixture(scope="module")
def pauses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Pause]]:
    """Yield all cases: while they are paused, they can wait together."""
    found: dict[tuple[str, str], Pause] = {}
    try:
        for where, whom in CASES:
            found[where, whom] = Pause(tmp_path_factory.mktemp("paused"), where, whom)
            found[where, whom].begin()
        yield found
    finally:
        for pause in found.values():
            with contextlib.suppress(ProcessLookupError):
                pause._send(signal.SIGCONT)
            pause.script.process.kill()
            pause.script.process.communicate()


@pytest.mark.parametrize("case", CASES, ids=" stops ".join)
def test_a_pause_does_not_count_as_trial_time(
    pauses: dict[tuple[str, str], Pause], case: tuple[str, str]
) -> None:
    pause = pauses[case]
    states = [pause.state_after(0.3), pause.state_after(3.3)]
    trial = pause.end()
    record = read_record(trial)
    assert states == [psutil.STATUS_STOPPED] * 2
    assert trial.state == TrialState.COMPLETE, record.reason
    assert record.breach is None and record.usage.wall_time is not None
    # Clock ticks of the meters count, and the start on a busy machine.
    assert 0.7 < record.usage.wall_time < 3.0


def test_a_pause_does_not_count_for_the_quota(start: Callable[[str, str, float], Script]) -> None:
    body = """
        from optuna_quota._ledger.status import status

        def used():
            return {line.resource: line.used for line in status(study).lines}["wall_time"]

        def objective(trial):
            mark("started")
            work(1.0)
            trial.set_user_attr("used", used())
            return 1.0
    """
    script = start(body, "here quota", 30.0)
    script.wait_for("started")
    os.kill(script.process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(script.process.pid, signal.SIGCONT)
    assert 0.9 < script.end().user_attrs["used"] < 3.0


def test_a_result_sent_while_the_study_is_stopped_is_kept(
    start: Callable[[str, str, float], Script],
) -> None:
    body = """
        def objective(trial):
            mark("started")
            os.kill(study_pid, signal.SIGSTOP)
            return 1.0
    """
    script = start(body, "process", 2.0)
    script.wait_for("started")
    time.sleep(2.5)
    os.kill(script.process.pid, signal.SIGCONT)
    trial = script.end()
    assert trial.state == TrialState.COMPLETE and read_record(trial).breach is None
    assert (read_record(trial).usage.wall_time or 9) < 2.0


def test_a_pause_does_not_count_as_grace_period(
    start: Callable[[str, str, float], Script],
) -> None:
    body = """
        def objective(trial):
            try:
                work(60)
            except LimitBreached:
                mark("saving")
                work(0.5)
                mark("saved")
                raise
    """
    script = start(body, "process", 1.0)
    script.wait_for("saving")
    os.kill(script.process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    assert not (script.folder / "saved").exists()
    os.kill(script.process.pid, signal.SIGCONT)
    trial = script.end()
    assert (script.folder / "saved").exists()
    assert read_record(trial).outcome == "terminated"


def test_processes_of_a_trial_are_stopped_and_continued(
    start: Callable[[str, str, float], Script],
) -> None:
    body = """
        def objective(trial):
            import subprocess
            beat = "import time\\nwhile True:\\n time.sleep(0.01)"
            child = subprocess.Popen([sys.executable, "-c", beat], start_new_session=True)
            still = subprocess.Popen([sys.executable, "-c", beat])
            still.send_signal(signal.SIGSTOP)
            Path(folder, "child").write_text(f"{child.pid} {still.pid}")
            mark("started")
            work(1.5)
            child.kill()
            still.kill()
            return 1.0
    """
    script = start(body, "process", 30.0)
    script.wait_for("started")
    child, still = map(int, (script.folder / "child").read_text().split())
    os.kill(script.process.pid, signal.SIGSTOP)
    time.sleep(0.5)
    assert psutil.Process(child).status() == psutil.STATUS_STOPPED
    os.kill(script.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    assert psutil.Process(child).status() != psutil.STATUS_STOPPED
    assert psutil.Process(still).status() == psutil.STATUS_STOPPED  # by the objective's own wish
    assert script.end().state == TrialState.COMPLETE


def test_a_trial_ends_with_its_stopped_study(
    start: Callable[[str, str, float], Script],
) -> None:
    script = start(WORKING, "process", 30.0)
    trial = psutil.Process(script.wait_for("started"))
    script.process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    script.process.kill()
    script.process.wait()
    _, alive = psutil.wait_procs([trial], timeout=20)
    assert not alive


def test_a_result_read_late_is_no_breach() -> None:
    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(1.5)

    handler = Slow()
    logging.getLogger("slow").addHandler(handler)

    def objective(trial: optuna.Trial) -> float:
        logging.getLogger("slow").warning("The study reads what comes after this much later.")
        return 1.0

    study = optuna.create_study()
    try:
        study.optimize(isolated(lambda trial: 0.0), n_trials=1)  # starts the fork server
        study.pruner = QuotaPruner(limits=Limits(wall_time=1.0))
        study.optimize(isolated(objective), n_trials=1)
    finally:
        logging.getLogger("slow").removeHandler(handler)
    assert study.trials[1].state == TrialState.COMPLETE


@pytest.mark.parametrize("resource", ["wall_time", "memory"])
def test_the_exit_of_a_trial_breaches_nothing(resource: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        import atexit

        if resource == "wall_time":
            atexit.register(time.sleep, 1.5)
        else:
            atexit.register(lambda: bytearray(300 * 2**20))
        return 1.0

    study = optuna.create_study()
    study.optimize(isolated(lambda trial: 0.0), n_trials=1)  # starts the fork server
    limits = Limits(wall_time=1.0) if resource == "wall_time" else Limits(memory="200MiB")
    study.pruner = QuotaPruner(limits=limits)
    study.optimize(isolated(objective, grace_period=5.0), n_trials=1)
    trial = study.trials[1]
    assert trial.state == TrialState.COMPLETE
    assert read_record(trial).breach is None
