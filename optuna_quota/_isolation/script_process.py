"""Run a script as the objective of an isolated trial, in the trial's process.

The trial's process starts the script, reports its intermediate values and forwards its output.
Limits, stop and accounting are those of every isolated trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from optuna import TrialPruned
from optuna.trial import BaseTrial

from optuna_quota._isolation import linux
from optuna_quota._units import format_signal
from optuna_quota.exceptions import LimitBreached


# Bytes of one read, and the most reads once the script has ended: its last output is in the pipe
# by then, and a process that it leaves behind may continue to write.
_CHUNK = 1 << 16
_LAST_READS = 16
# The longest line, in bytes, that may hold a value; a longer one is forwarded in pieces.
MAX_LINE = 1 << 20
# Seconds between checks of the script's process, if nothing wakes this one.
_INTERVAL = 0.05
# Lines of standard error for the reason of a failure, and to search for a failed allocation, and
# the most bytes of each.
_LAST_LINES = 10
_LONGEST_LINE = 500
_KEPT_LINES = 1000
_KEPT_LENGTH = 4096


class ScriptFailed(Exception):
    """A script failed, with an exit status (negative for a signal) if it was started."""

    def __init__(self, reason: str, *, exitcode: int | None = None, stderr: str = "") -> None:
        super().__init__(reason)
        self.exitcode = exitcode
        self.stderr = stderr


@dataclass(frozen=True)
class RunScript:
    """An objective that runs a script, with additional environment variables."""

    words: Sequence[str]
    folder: str | None
    env: Mapping[str, str]
    grace_period: float

    def __call__(self, trial: BaseTrial) -> float | list[float]:
        script = _Script(f"[trial {trial.number}] ")
        final: float | list[float] | None = None
        can_report = True
        try:
            script.start(self)
            for line in script.read():
                for found in find_values(line):
                    if found.step is None:
                        final = found.value
                    elif can_report:
                        can_report = _report(trial, found)
        except BaseException as error:
            # SIGINT after Ctrl-C, as for any other program; else the polite stop.
            is_interrupt = isinstance(error, KeyboardInterrupt)
            script.stop(signal.SIGINT if is_interrupt else signal.SIGTERM, self.grace_period)
            raise
        if script.exitcode == -signal.SIGXCPU:
            raise LimitBreached("The trial used up its CPU time.", resource="cpu_time")
        if script.exitcode or final is None:
            raise script.failure()
        return final


def _report(trial: BaseTrial, found: ScriptValue) -> bool:
    """Report an intermediate value; return whether the study accepts them."""
    assert found.step is not None
    try:
        trial.report(found.value, found.step)  # type: ignore[arg-type]  # one value with a step
    except NotImplementedError:
        return False  # it has several objectives
    if trial.should_prune():
        raise TrialPruned(f"Trial was pruned at step {found.step}.")
    return True


class _Script:
    """A script's process, whose output is forwarded with a prefix before each line."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._selector = selectors.DefaultSelector()
        self._oom_kills = linux.count_oom_kills()

    def start(self, options: RunScript) -> None:
        # Python then writes line by line, as to a terminal.
        env = {"PYTHONUNBUFFERED": "1", **os.environ, **options.env}
        try:
            self._process = subprocess.Popen(
                options.words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=options.folder,
                env=env,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ScriptFailed(f"The script could not be started: {error}.") from error
        for name in self._lines:
            stream = getattr(self._process, name).fileno()
            os.set_blocking(stream, False)
            self._selector.register(stream, selectors.EVENT_READ, name)
        if linux.can_supervise():
            self._selector.register(os.pidfd_open(self._process.pid), selectors.EVENT_READ)

    @property
    def exitcode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def read(self) -> Iterator[str]:
        """Forward the output until the script has ended; yield lines of standard output."""
        while self.exitcode is None:
            yield from self._read_ready(None if linux.can_supervise() else _INTERVAL)
        for _ in range(_LAST_READS):
            yield from self._read_ready(0.0)
        yield from self._read_rest()

    def stop(self, number: int, seconds: float) -> None:
        """Send a signal to the script's processes and give them time to end.

        The rest is killed with the trial's process.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + seconds
        if self.exitcode is None and seconds > 0:
            if linux.can_supervise():
                # Reaps those whose parent ends first, such as a shell.
                linux.become_subreaper()
            with contextlib.suppress(OSError):
                for signum in (number, signal.SIGCONT):
                    os.killpg(self._process.pid, signum)
        while self._is_alive() and time.monotonic() < deadline:
            self._read_ready(_INTERVAL)
        self._read_rest()

    def failure(self) -> ScriptFailed:
        code = self.exitcode
        if not code:
            reason = (
                "The script printed no value. A line of its standard output must be a JSON object "
                'such as {"value": 0.25}, or {"values": [0.25, 3]} for several objectives.'
            )
        elif code > 0:
            reason = f"The script ended with exit status {code}."
        else:
            by_kernel = code == -signal.SIGKILL and linux.count_oom_kills() > self._oom_kills
            cause = ", probably by the kernel's out-of-memory killer" if by_kernel else ""
            reason = f"The script was killed by {format_signal(-code)}{cause}."
        last = [line[:_LONGEST_LINE] for line in self._errors if line.strip()][-_LAST_LINES:]
        if code and last:
            reason += " The end of its standard error:\n" + "\n".join(last)
        return ScriptFailed(reason, exitcode=code, stderr="\n".join(self._errors))

    def _is_alive(self) -> bool:
        if self.exitcode is None:
            return True
        if not linux.can_supervise():
            return False
        linux.reap()
        return bool(linux.children())

    def _read_ready(self, timeout: float | None) -> list[str]:
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
            found += self._pass_on(key.data, self._lines[key.data].feed(data))
        return found

    def _read_rest(self) -> list[str]:
        found: list[str] = []
        for name, lines in self._lines.items():
            found += self._pass_on(name, lines.end())
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
    # Its reader may be gone.
    with contextlib.suppress(OSError):
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            stream.write(text.encode(error.encoding, "replace").decode(error.encoding))


# What it prints.


class LineSplitter:
    """Splits a stream of bytes into lines of text; undecodable bytes are replaced."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [_decode(line) for line in lines]

    def end(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [_decode(rest)] if rest else []


def _decode(line: bytes) -> str:
    # Progress bars overwrite their line; a terminal shows the last version.
    text = line.decode("utf-8", "replace").rstrip("\r")
    return text.rpartition("\r")[2]


class ScriptValue(NamedTuple):
    """A line ``{"value": …}`` or ``{"values": […]}``; an intermediate value with its step."""

    value: float | list[float]
    step: int | None = None


def find_values(line: str) -> list[ScriptValue]:
    """Return the values in a line of output, empty if it has none.

    Processes that share the output, such as ranks, may print two objects into one line.
    """
    found, rest = [], line.strip()
    while rest.startswith("{"):
        try:
            content, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(_value_of(content))
        rest = rest[end:].lstrip()
    return [] if rest else [value for value in found if value is not None]


_DECODER = json.JSONDecoder()


def _value_of(content: dict[str, Any]) -> ScriptValue | None:
    value = _number(content.get("value"))
    if "step" in content:
        step = _number(content["step"])
        if value is None or step is None or not step.is_integer() or step < 0:
            return None
        return ScriptValue(value, int(step))
    if value is not None:
        return ScriptValue(value)
    values = content.get("values")
    numbers = [_number(v) for v in values] if isinstance(values, list) else []
    known = [number for number in numbers if number is not None]
    return ScriptValue(known) if known and len(known) == len(numbers) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
