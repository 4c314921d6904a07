"""Run a script as the objective of an isolated trial, in the trial's process.

The trial's process starts the script, reports its intermediate values and passes on its output.
Limits, the kill and the accounting are those of every isolated trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
import contextlib
from dataclasses import dataclass
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, TYPE_CHECKING

from optuna import TrialPruned

from optuna_quota._isolation import exit_cause, linux
from optuna_quota._isolation.linux import can_supervise
from optuna_quota._isolation.script_output import (
    FinalValue,
    find_values,
    IntermediateValue,
    LineSplitter,
)
from optuna_quota.exceptions import LimitBreached


if TYPE_CHECKING:
    from optuna.trial import BaseTrial


# Bytes of one read, and the most reads of what is left once the script has ended: its last output
# is in the pipe by then, and a process that it leaves behind may go on writing.
_CHUNK = 1 << 16
_LAST_READS = 16
# Seconds between two looks at the script's process, where nothing wakes this one.
_INTERVAL = 0.05
# Of standard error: lines for the reason of a failure, and those searched for a failed allocation,
# and how much of each.
_LAST_LINES = 10
_LONGEST_LINE = 500
_KEPT_LINES = 1000
_KEPT_LENGTH = 4096


class ScriptFailed(Exception):
    """Raised in a trial's process when its script has failed.

    Args:
        reason: One sentence, with the last lines of standard error.
        exitcode: The script's exit status, negative for a signal; None if it did not start.
        stderr: The end of its standard error.
    """

    def __init__(self, reason: str, *, exitcode: int | None = None, stderr: str = "") -> None:
        super().__init__(reason)
        self.exitcode = exitcode
        self.stderr = stderr


@dataclass(frozen=True)
class RunScript:
    """An objective that runs a script.

    Attributes:
        words: The command.
        folder: The working directory; None for that of the study.
        env: Environment variables beside those of the study.
        grace_period: Seconds from SIGTERM to the kill of a trial that is pruned.
    """

    words: tuple[str, ...]
    folder: str | None
    env: Mapping[str, str]
    grace_period: float

    def __call__(self, trial: BaseTrial) -> float | list[float]:
        """Run the script; return its value or values."""
        script = _Script(self, f"[trial {trial.number}] ")
        final: FinalValue | None = None
        values = _Reporter(trial)
        try:
            script.start()
            for line in script.read():
                for value in find_values(line):
                    if isinstance(value, FinalValue):
                        final = value
                    else:
                        values.report(value)
        except BaseException as error:
            # Ctrl-C, as it reaches any other program; else the polite stop.
            is_interrupt = isinstance(error, KeyboardInterrupt)
            script.stop(signal.SIGINT if is_interrupt else signal.SIGTERM, self.grace_period)
            raise
        if script.exitcode == -signal.SIGXCPU:
            raise LimitBreached("The trial used up its CPU time.", resource="cpu_time")
        if script.exitcode or final is None:
            raise script.failure()
        return final.value


class _Reporter:
    """Reports intermediate values, and stops the trial when it is to be pruned.

    Args:
        trial: The trial.
    """

    def __init__(self, trial: BaseTrial) -> None:
        self._trial = trial
        self._can_report = True

    def report(self, found: IntermediateValue) -> None:
        """Report a value; raise TrialPruned if the pruner says so."""
        if not self._can_report:
            return
        try:
            self._trial.report(found.value, found.step)
        except NotImplementedError:
            self._can_report = False  # the study has several objectives
            return
        if self._trial.should_prune():
            raise TrialPruned(f"Trial was pruned at step {found.step}.")


class _Script:
    """A script's process, and its output.

    Args:
        options: How to run it.
        prefix: What each line of its output begins with where it is passed on.
    """

    def __init__(self, options: RunScript, prefix: str) -> None:
        self._options = options
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._selector = selectors.DefaultSelector()
        self._streams: dict[str, int] = {}
        self._oom_kills = 0

    def start(self) -> None:
        """Start the script, in a process group of its own."""
        self._oom_kills = linux.count_oom_kills()
        # Output of Python comes line by line then, as to a terminal, and not at the end.
        env = {"PYTHONUNBUFFERED": "1", **os.environ, **self._options.env}
        try:
            self._process = subprocess.Popen(
                self._options.words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._options.folder,
                env=env,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ScriptFailed(f"The script could not be started: {error}.") from error
        for name in self._lines:
            stream = getattr(self._process, name).fileno()
            os.set_blocking(stream, False)
            self._streams[name] = stream
            self._selector.register(stream, selectors.EVENT_READ, name)
        if can_supervise():
            self._selector.register(os.pidfd_open(self._process.pid), selectors.EVENT_READ)

    @property
    def exitcode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    def read(self) -> Iterator[str]:
        """Pass on the output until the script has ended; yield lines of standard output."""
        while self.exitcode is None:
            yield from self._read_ready(None if can_supervise() else _INTERVAL)
        for _ in range(_LAST_READS):
            if not self._streams:
                break
            yield from self._read_ready(0.0)
        for name in self._lines:
            yield from self._pass_on(name, self._lines[name].end())

    def stop(self, number: int, seconds: float) -> None:
        """Send a signal to the script's processes and give them time to end.

        What is left then is killed with the trial's process.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + seconds
        if self.exitcode is None and seconds > 0:
            if can_supervise():
                # Those whose parent ends first, such as a shell, are waited for here.
                linux.become_subreaper()
            with contextlib.suppress(OSError):
                for signum in (number, signal.SIGCONT):
                    os.killpg(self._process.pid, signum)
        while self._is_alive() and time.monotonic() < deadline:
            for _ in self._read_ready(_INTERVAL):
                pass
        for name in self._lines:
            for _ in self._pass_on(name, self._lines[name].end()):
                pass

    def failure(self) -> ScriptFailed:
        """Return the error for a script that has failed or printed no value."""
        code = self.exitcode
        reason = (
            "The script printed no value. A line of its standard output must be a JSON object "
            'such as {"value": 0.25}, or {"values": [0.25, 3]} for several objectives.'
        )
        if code:
            reason = exit_cause.describe_script_exit(
                code, oom_kills=linux.count_oom_kills() - self._oom_kills
            )
            last = [line for line in self._errors if line.strip()][-_LAST_LINES:]
            if last:
                lines = "\n".join(line[:_LONGEST_LINE] for line in last)
                reason = f"{reason} The end of its standard error:\n{lines}"
        return ScriptFailed(reason, exitcode=code, stderr="\n".join(self._errors))

    def _is_alive(self) -> bool:
        if self.exitcode is None:
            return True
        if not can_supervise():
            return False
        linux.reap()
        return bool(linux.children())

    def _read_ready(self, timeout: float | None) -> list[str]:
        """Pass on what has arrived; return the lines of standard output."""
        found: list[str] = []
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                # The process has ended.
                self._selector.unregister(key.fileobj)
                os.close(key.fd)
                continue
            data = os.read(key.fd, _CHUNK)
            if not data:
                self._selector.unregister(key.fileobj)
                del self._streams[key.data]
            lines = self._pass_on(key.data, self._lines[key.data].feed(data))
            found += lines
        return found

    def _pass_on(self, name: str, lines: list[str]) -> list[str]:
        """Print lines with the trial's number; return them if they are of standard output."""
        if lines:
            _write(getattr(sys, name), "".join(f"{self._prefix}{line}\n" for line in lines))
        if name == "stderr":
            self._errors += (line[:_KEPT_LENGTH] for line in lines)
            return []
        return lines


def _write(stream: Any, text: str) -> None:
    if stream is None:
        return
    # Nobody may read it any more.
    with contextlib.suppress(OSError):
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
