"""The study's side of a running trial: answers its calls until its process has ended."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import threading
import time
from typing import Any, Protocol

from optuna_quota._isolation import linux, messages, rpc
from optuna_quota._isolation.channel import (
    Channel,
    pack_error,
    TrialConnections,
    UnreadableMessage,
)
from optuna_quota._isolation.out_of_memory import find_failed_allocation_in_text
from optuna_quota._isolation.output import Output, replay_output, Warned
from optuna_quota._isolation.signals import Interrupts
from optuna_quota._isolation.supervisor import KILL_TIME
from optuna_quota._metering import metering_loop
from optuna_quota._usage import Breach


_logger = logging.getLogger("optuna.quota.isolated")

# Least seconds between two checks of the trial's row, and the most share of the time that they may
# take, as the trial's calls wait meanwhile.
_ROW_INTERVAL = 2.0
_ROW_SHARE = 0.05

# Seconds after a trial should have ended in which its supervisor has to report. It gives up on a
# process that can't be killed earlier, unless it hangs itself.
REPORT_TIME = KILL_TIME + 60.0


class NotStarted(OSError):
    """The trial's processes ended before the objective began."""


class TrialEvents(Protocol):
    """Callbacks of a server while it serves a trial."""

    def on_ready(self, ready: messages.Ready) -> None: ...
    def on_report(self, step: int) -> None: ...
    def on_outcome(self) -> float: ...  # The seconds that the process has to end
    def find_breach(self) -> Breach | None: ...  # For `optuna_quota.check`
    def measure_gpus(self) -> None: ...  # When an allocation on a GPU has failed
    def check_row(self) -> None: ...  # Whether something else has finished the row


class Server:
    """Serves one trial's process from the thread that runs the trial."""

    def __init__(
        self,
        connections: TrialConnections,
        remote: rpc.RemoteObjects,
        events: TrialEvents,
        *,
        label: str,
    ) -> None:
        self.ready: messages.Ready | None = None  # Sent before the objective is called
        self.outcome: messages.Outcome | None = None  # None while the objective runs
        self.exit: messages.ExitReport | None = None  # None while the process runs
        self.never_fits = False  # Whether the breach is of memory, before the objective began
        # One that the objective has warned of
        self.failed_allocation: messages.FailedAllocation | None = None
        self._control = connections.control
        # Of the trial's own process, then of those that it starts.
        self._channels = [connections.channel]
        self._selector = selectors.DefaultSelector()
        for source in (self._control, connections.channel, remote.listener):
            self._selector.register(source, selectors.EVENT_READ)
        self._remote = remote
        self._events = events
        self._label = label
        self._sending = threading.Lock()
        self._started = False
        # A pidfd: copies of its connection may be open elsewhere when it is gone.
        self._supervisor: int | None = None
        self._session: linux.TrialSession | None = None
        self._now = metering_loop().now
        self._overdue = math.inf
        self._stop_requested = False
        self._breach: Breach | None = None
        self._interrupts = Interrupts()

    @property
    def breach(self) -> Breach | None:
        """Why the trial was stopped, None if it was not.

        An objective that ended before it was asked to stop keeps its outcome, however late that
        is read here.
        """
        ended_first = self.outcome is not None and not self.outcome.stop_requested
        return None if ended_first else self._breach

    def stop(self, reason: messages.StopReason, grace_period: float) -> None:
        """Ask the trial to stop, and kill it after the grace period; thread-safe.

        The first of several reasons counts.
        """
        with self._sending:
            if isinstance(reason, Breach):
                if self._breach is not None or self.exit is not None:
                    return
                self._breach = reason
            self._expect_stop(grace_period)
            self._send(messages.StopTrial(reason, grace_period))

    def kill_soon(self) -> None:
        """Kill the trial, which ends :meth:`serve`; thread-safe."""
        with self._sending:
            self._expect_end(0.0)
            self._send(messages.KillTrial())

    def kill(self) -> None:
        if self.exit is not None:
            return
        self.kill_soon()
        others: list[Any] = [self._remote.listener, *self._channels]
        for source in others:
            with contextlib.suppress(KeyError):
                self._selector.unregister(source)
        with contextlib.suppress(NotStarted):
            while self.exit is None:
                self._serve_ready(self._selector.select(max(0.0, self._overdue - self._now())))

    def serve(self) -> None:
        """Serve until the trial's process has ended; raises NotStarted if it never began."""
        self._interrupts = Interrupts()
        with self._interrupts:
            self._serve()

    def close(self) -> None:
        """Close the connections once no process of the trial is left."""
        self._selector.close()
        for channel in self._channels[1:]:
            channel.close()
        if self._supervisor is not None:
            os.close(self._supervisor)
            self._supervisor = None

    def _serve(self) -> None:
        due = time.monotonic() + _ROW_INTERVAL
        while self.exit is None:
            with self._interrupts.allowed():
                begun = time.monotonic()
                if begun >= due:
                    self._events.check_row()
                    now = time.monotonic()
                    due = now + max(_ROW_INTERVAL, (now - begun) / _ROW_SHARE)
                ready = self._selector.select(max(0.0, due - time.monotonic()))
            self._serve_ready(ready)
        # Processes of the trial may have ended since they connected or sent something.
        while self._accept():
            pass
        for channel in self._channels:
            for message in channel.drain():
                self._handle(message, channel)

    def _serve_ready(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            source: Any = key.fileobj
            if source is self._control or source == self._supervisor:
                self._serve_supervisor(source)
            elif source is self._remote.listener:
                self._accept()
            elif not self._serve_process(source):
                self._selector.unregister(source)
                if source is not self._channels[0]:
                    self._channels.remove(source)
                    source.close()
        self._check_overdue()

    def _accept(self) -> bool:
        new = self._remote.listener.accept()
        if new is not None:
            self._channels.append(new)
            self._selector.register(new, selectors.EVENT_READ)
        return new is not None

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self._control.send(message)

    def _expect_stop(self, grace_period: float) -> None:
        if not self._stop_requested:  # the supervisor goes by the first as well
            self._stop_requested = True
            self._expect_end(grace_period)

    def _expect_end(self, seconds: float) -> None:
        self._overdue = min(self._overdue, self._now() + seconds + REPORT_TIME)

    def _check_overdue(self) -> None:
        """Kill a supervisor that does not report; the kernel kills the trial along with it."""
        if self.exit is not None or self._now() < self._overdue:
            return
        if self._supervisor is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._supervisor, signal.SIGKILL)
        self._end_without_report()
        self.exit = messages.ExitReport(
            exitcode=None,
            stuck=f"The supervisor of the trial's process did not report its end within "
            f"{REPORT_TIME:g} s of when it was due, and was killed.",
        )

    def _end_without_report(self) -> None:
        """Kill what the trial has started and its supervisor can't kill any more."""
        if self._session is not None:
            self._session.kill()

    def _serve_supervisor(self, source: Any) -> None:
        is_gone = source == self._supervisor
        try:
            for message in self._control.drain() if is_gone else self._control.arrived():
                self._handle_supervisor(message)
            if is_gone:
                raise EOFError("The supervisor is gone.")
        except (EOFError, OSError) as error:
            if self.exit is not None:
                return
            if not self._started:
                raise NotStarted("The trial's processes did not start.") from error
            # The supervisor was killed; the kernel has killed the trial along with it.
            self._end_without_report()
            self.exit = messages.ExitReport(exitcode=None)

    def _handle_supervisor(self, message: Any) -> None:
        if isinstance(message, messages.ProcessStarted):
            self._started = True
            if message.supervisor is not None:
                with contextlib.suppress(OSError):  # it is gone already
                    self._supervisor = os.pidfd_open(message.supervisor)
                    self._selector.register(self._supervisor, selectors.EVENT_READ)
        elif isinstance(message, messages.BreachFound):
            with self._sending:
                self._expect_stop(message.grace_period)
                if self._breach is None:
                    self._breach, self.never_fits = message.breach, message.before_objective
        elif isinstance(message, messages.ProcessPaused):
            _logger.warning(
                f"{self._label}'s process was stopped by a signal (SIGSTOP); it will be killed "
                f"unless it continues within {message.timeout:g} s."
            )
        elif isinstance(message, messages.ExitReport):
            self.exit = message

    def _serve_process(self, channel: Channel) -> bool:
        """Handle messages of a process of the trial; return whether more may come."""
        try:
            for message in channel.arrived():
                self._handle(message, channel)
        except (EOFError, ConnectionError):
            return False
        return True

    def _handle(self, message: Any, channel: Channel) -> None:
        if type(message) is tuple:
            self._serve_call(message, channel)
        elif isinstance(message, Output):
            if isinstance(message, Warned) and self.failed_allocation is None:
                self.failed_allocation = find_failed_allocation_in_text(message.warning.text)
            try:
                replay_output(message)
            except Exception:
                _logger.exception(f"{self._label}: a part of its output could not be shown here.")
        elif isinstance(message, messages.Ready):
            self.ready = message
            if message.supervisor is not None:
                self._session = linux.TrialSession(message.pid)
            self._events.on_ready(message)
        elif isinstance(message, UnreadableMessage):
            # It may wait for an answer, but the call is unreadable.
            with self._sending:
                if self.outcome is None:
                    self.outcome = messages.Unsendable(
                        f"The trial's process sent an object that the study's process can't load: "
                        f"{message}. Return numbers, and set attributes of built-in types."
                    )
            self.kill_soon()
        elif isinstance(message, messages.Outcome):
            with self._sending:
                self.outcome = message
            seconds = self._events.on_outcome()
            with self._sending:
                self._expect_end(seconds)
                self._send(messages.ExitWithin(seconds))

    def _serve_call(self, call: rpc.Call, channel: Channel) -> None:
        try:
            with self._interrupts.allowed():
                answer = self._answer(call)
        except BaseException as error:
            # An interrupt (Ctrl-C): the objective, which waits for the answer, gets it as well.
            _send_answer((call[0], None, pack_error(error)), channel)
            raise
        _send_answer(answer, channel)
        _, target, name, args, kwargs = call
        if name == "report" and target == rpc.TRIAL and answer[2] is None and args is not None:
            self._events.on_report(int(args[1] if args[1:] else kwargs["step"]))

    def _answer(self, call: rpc.Call) -> rpc.Answer:
        number, index, name, args, kwargs = call
        value: Any = None
        try:
            if name == rpc.CHECK:
                value = self._events.find_breach()
            elif name == rpc.CHOOSE:
                value = rpc.suggest_object(self._remote[index], *(args or ()))
            elif name == rpc.MEASURE:
                self._events.measure_gpus()
            elif name != rpc.SYNC:
                value = getattr(self._remote[index], name)
                if args is not None:
                    value = value(*args, **kwargs)
                elif callable(value) and not isinstance(value, type):
                    value = rpc.Method()
        except Exception as error:  # noqa: BLE001 - the objective's to handle
            return number, None, pack_error(error)
        return number, self._remote.handle(value) if rpc.is_remote(value) else value, None


def _send_answer(answer: rpc.Answer, channel: Channel) -> None:
    with contextlib.suppress(OSError):  # the process is gone
        try:
            channel.send(answer)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the value can't be pickled
            channel.send((answer[0], None, pack_error(error)))
