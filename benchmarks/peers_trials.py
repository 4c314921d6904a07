"""The trials of ``peers.py``: real objectives, what they log of themselves, and who watches them.

Each trial, in whatever process a tool starts for it, appends a line to a log when the objective
begins and one when it ends. One observer in the tool's process reads them and looks at the trial
every 5 ms. So the time spent, the breaches and the peaks mean the same for all tools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import json
from multiprocessing.connection import Connection
import os
from pathlib import Path
import resource
import signal
import threading
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
import psutil
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.gaussian_process.kernels import Matern, RBF
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split


MIB = 2**20
# A trial that ended by itself has kept a limit that it passed by less than clocks differ.
TOLERANCE = 0.02


def kernel_ridge(params: Mapping[str, Any], scale: float) -> float:
    """Return the error of kernel ridge regression; its memory is quadratic in the rows."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (int(params["rows"] * scale) + 500, 4))
    y = np.sin(x).sum(axis=1) + np.abs(x[:, 0] * x[:, 1]) + 0.1 * rng.normal(size=len(x))
    length = params["length"]
    kernel = RBF(length) if params["kernel"] == "rbf" else Matern(length, nu=1.5)
    model = KernelRidge(alpha=params["alpha"], kernel=kernel)
    model.fit(x[500:], y[500:])
    return float(np.mean((model.predict(x[:500]) - y[:500]) ** 2))


def forest(params: Mapping[str, Any], scale: float) -> float:
    """Return the log loss of extremely randomised trees on digits, seen many times with noise."""
    images, digits = load_digits(return_X_y=True)
    x, other, y, wanted = train_test_split(images, digits, test_size=0.4, random_state=0)
    rng = np.random.default_rng(0)
    seen = rng.integers(len(x), size=int(params["rows"] * scale * len(x)))
    model = ExtraTreesClassifier(
        params["n_estimators"],
        max_depth=params["max_depth"],
        max_features=params["max_features"],
        random_state=0,
    )
    model.fit(x[seen] + rng.normal(0, 2, (len(seen), x.shape[1])), y[seen])
    return float(log_loss(wanted, model.predict_proba(other), labels=range(10)))


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Return a value of a parameter, as an objective asks for it."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, log = distribution.low, distribution.high, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, low, high, log=log)


@dataclass(frozen=True)
class Problem:
    """An objective and its search space.

    Attributes:
        function: Of a point and a scale, which calibration sets.
        space: What is searched.
        worst: The loss of a model that has learned nothing, for tools that want a value.
        cheap: The starting point of FLAML.
        wall_time: The limit in seconds, whole ones for SMAC3; None to limit memory.
    """

    function: Callable[[Mapping[str, Any], float], float]
    space: dict[str, BaseDistribution]
    worst: float
    cheap: dict[str, Any]
    wall_time: float | None = None


PROBLEMS = {
    "kernel ridge": Problem(
        kernel_ridge,
        {
            "rows": IntDistribution(500, 6000),
            "alpha": FloatDistribution(1e-4, 1.0, log=True),
            "length": FloatDistribution(0.3, 30.0, log=True),
            "kernel": CategoricalDistribution(["rbf", "matern"]),
        },
        worst=12.0,
        cheap={"rows": 500},
    ),
    "forest": Problem(
        forest,
        {
            "n_estimators": IntDistribution(10, 300, log=True),
            "max_depth": IntDistribution(2, 20),
            "max_features": FloatDistribution(0.05, 1.0),
            "rows": FloatDistribution(0.1, 1.0),
        },
        worst=2.303,
        cheap={"n_estimators": 10, "rows": 0.1},
        wall_time=1.0,
    ),
}


@dataclass(frozen=True)
class Task:
    """A problem as calibrated.

    Attributes:
        problem: Its name.
        scale: Of its work.
        budget: Seconds that all trials of a study may take.
        memory: The limit on one trial in bytes, None for none.
        room: The part of it that a trial finds free when it begins.
        wall_time: The limit on one trial in seconds, None for none.
    """

    problem: str
    scale: float
    budget: float
    memory: float | None = None
    room: float | None = None
    wall_time: float | None = None

    def __str__(self) -> str:
        if self.memory is not None:
            return f"memory <= {self.memory / MIB:.0f} MiB, {self.budget:.0f} s of trial time"
        return (
            f"wall time <= {self.wall_time:g} s, {self.budget:.0f} s of trial time, "
            f"work scaled by {self.scale:.2f}"
        )


def own_memory() -> tuple[int, int]:
    """Return this process's address space and its private resident memory in bytes."""
    space, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return space * resource.getpagesize(), (resident - shared) * resource.getpagesize()


@dataclass(frozen=True)
class Target:
    """The objective, which logs when it began and ended."""

    problem: str
    scale: float
    log: str

    def __call__(self, params: Mapping[str, Any]) -> float:
        """Return the loss of a point."""
        self._write("start", own_memory()[1])
        loss = None
        try:
            loss = PROBLEMS[self.problem].function(params, self.scale)
        finally:
            self._write("end", loss)
        return loss

    def mended(self, config: Any, seed: int = 0) -> float:
        """Return the loss for SMAC3; SIGTERM ends it, which pynisher has trials live through."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self(dict(config))

    def _write(self, event: str, value: float | None) -> None:
        line = [event, os.getpid(), time.monotonic(), time.process_time(), value]
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        os.write(file, json.dumps(line).encode() + b"\n")
        os.close(file)


def send(connection: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """Send what a function returns."""
    connection.send(function(*arguments))


@dataclass
class Trial:
    """One trial, as reported by the log, the observer and the tool."""

    pid: int
    start: float
    end: float | None = None
    loss: float | None = None
    cpu: float = 0.0
    entry: int = 0
    peak: int = 0
    rise: int = 0
    told: bool | None = None

    def seconds(self) -> float:
        return (time.monotonic() if self.end is None else self.end) - self.start

    def kept(self, task: Task) -> bool:
        """Return whether a trial that ended by itself was within the limits, seen from outside."""
        late = task.wall_time is not None and self.seconds() > task.wall_time * (1 + TOLERANCE)
        return not late and self.excess(task) <= TOLERANCE * (task.memory or 0)

    def excess(self, task: Task) -> float:
        """Return the bytes over the memory limit.

        By resident memory, or where the tool caps address space instead, by how much private
        memory grew: the lesser, as the interpreters that tools start are not equally large.
        """
        if task.memory is None or task.room is None:
            return 0.0
        return max(0.0, min(self.peak - task.memory, self.rise - task.room))


class Observer:
    """Reads the log and watches the trials in it; a context manager.

    Attributes:
        path: The log.
        trials: Those begun, in order.
        cpu: Seconds of a core that the observer itself took.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path, self.trials, self.cpu = path, list[Trial](), 0.0
        self._file = path.open()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()

    def spent(self) -> float:
        """Return the seconds of all trials until now."""
        with self._lock:
            self._look()
            return sum(trial.seconds() for trial in self.trials)

    def tell(self, breached: bool) -> None:
        """Record how the tool judged the latest trial."""
        with self._lock:
            self._look()
            if self.trials and self.trials[-1].told is None:
                self.trials[-1].told = breached

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            with self._lock:
                self._look()
            self.cpu = time.thread_time()

    def _look(self) -> None:
        for line in self._file:
            event, pid, at, cpu, value = json.loads(line)
            if event == "start":
                self.trials.append(Trial(pid, at, entry=value))
            else:
                trial = self.trials[-1]
                trial.end, trial.loss, trial.cpu = at, value, cpu
        if self.trials and self.trials[-1].end is None:
            self._watch(self.trials[-1])

    def _watch(self, trial: Trial) -> None:
        try:
            process = psutil.Process(trial.pid)
            memory, cpu = process.memory_info(), process.cpu_times()
        except psutil.Error:
            trial.end = time.monotonic()
            return
        if not memory.rss:  # dead, and not reaped yet
            trial.end = time.monotonic()
            return
        trial.cpu = cpu.user + cpu.system
        trial.peak = max(trial.peak, memory.rss)
        trial.rise = max(trial.rise, memory.rss - memory.shared - trial.entry)
