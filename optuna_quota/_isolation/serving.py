"""The study's side of a trial: does what the child asks, until nothing of the child is left."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import logging
import selectors
import threading
from typing import Any
from warnings import WarningMessage

from optuna_quota._isolation.calls import Answer
from optuna_quota._isolation.calls import Call
from optuna_quota._isolation.calls import is_remote
from optuna_quota._isolation.calls import Method
from optuna_quota._isolation.calls import RemoteObjects
from optuna_quota._isolation.child import Exited
from optuna_quota._isolation.child import Raised
from optuna_quota._isolation.child import Ready
from optuna_quota._isolation.child import Returned
from optuna_quota._isolation.child import Unsendable
from optuna_quota._isolation.child_trial import CHECK
from optuna_quota._isolation.child_trial import MEASURE
from optuna_quota._isolation.control import Breached
from optuna_quota._isolation.control import Interrupt
from optuna_quota._isolation.control import Kill
from optuna_quota._isolation.control import Leave
from optuna_quota._isolation.control import Paused
from optuna_quota._isolation.control import Started
from optuna_quota._isolation.control import StopFor
from optuna_quota._isolation.ending import Ended
from optuna_quota._isolation.launch import Launched
from optuna_quota._isolation.output import Printed
from optuna_quota._isolation.output import replay
from optuna_quota._isolation.output import SYNC
from optuna_quota._isolation.remote_errors import pack_error
from optuna_quota._isolation.shortage import find_shortage_in_text
from optuna_quota._isolation.shortage import Shortage
from optuna_quota._resources import Breach


_logger = logging.getLogger("optuna.quota.isolated")

Outcome = Returned | Raised | Exited | Unsendable


class NotStarted(OSError):
    """The trial's processes were gone before they began."""


class Server:
    """Serves one trial's process from the thread that runs the trial.

    Args:
        launched: The connections.
        remote: What the child may call.
        on_ready: Called when the objective is about to run.
        on_report: Called after a report with the step.
        on_outcome: Called when the objective has ended; returns the seconds that its process may
            take to end from then on, None for any time.
        ask_breach: Answers ``optuna_quota.check``.
        measure: Reads what the trial holds at this moment.
        label: What the trial is called in the log.

    Attributes:
        outcome: What came of the objective, None while nothing has.
        ended: How its process ended, None while it runs.
        shortage: The failed allocation that the objective warned of, None when it did not.
    """

    def __init__(
        self,
        launched: Launched,
        remote: RemoteObjects,
        *,
        on_ready: Callable[[Ready], None],
        on_report: Callable[[int], None],
        on_outcome: Callable[[], float | None],
        ask_breach: Callable[[], Breach | None],
        measure: Callable[[], object],
        label: str,
    ) -> None:
        self.outcome: Outcome | None = None
        self.ended: Ended | None = None
        self.data_limit: int | None = None
        self.shortage: Shortage | None = None
        self._launched = launched
        self._remote = remote
        self._on_ready = on_ready
        self._on_report = on_report
        self._on_outcome = on_outcome
        self._ask_breach = ask_breach
        self._measure = measure
        self._label = label
        self._sending = threading.Lock()
        self._started = False
        self._stopped_for: Breach | None = None

    @property
    def breach(self) -> Breach | None:
        """What the trial was stopped for, None when it was not.

        Of an objective that ended before it was told so, what came of it stands, however late it
        is read here.
        """
        ended_first = self.outcome is not None and not self.outcome.told
        return None if ended_first else self._stopped_for

    def stop(self, breach: Breach, grace_period: float) -> None:
        """Have the trial stopped for a breach; from any thread, once.

        A result that has come stays one: what the process does after it is stopped all the same.
        """
        with self._sending:
            if self._stopped_for is None and self.ended is None:
                self._stopped_for = breach
                with contextlib.suppress(OSError):
                    self._launched.control.send(StopFor(breach, grace_period))

    def interrupt(self, grace_period: float) -> None:
        """Have the trial stopped by a KeyboardInterrupt; then serve on."""
        with self._sending, contextlib.suppress(OSError):
            self._launched.control.send(Interrupt(grace_period))

    def kill(self) -> None:
        """Have the trial killed now and wait until nothing of it is left."""
        if self.ended is not None:
            return
        with self._sending, contextlib.suppress(OSError):
            self._launched.control.send(Kill())
        with contextlib.suppress(EOFError, OSError):
            while self.ended is None:
                self._hear_supervisor(self._launched.control.receive())

    def serve(self) -> None:
        """Serve until the trial's process has ended.

        Raises:
            NotStarted: If it never began.
        """
        channel, control = self._launched.channel, self._launched.control
        with selectors.DefaultSelector() as selector:
            selector.register(control, selectors.EVENT_READ)
            selector.register(channel, selectors.EVENT_READ)
            listening = True
            while self.ended is None:
                for key, _ in selector.select():
                    if key.fileobj is control:
                        self._serve_supervisor()
                    elif listening and not self._serve_child():
                        listening = False
                        selector.unregister(channel)
        for message in channel.drain():
            self._handle(message)

    def _serve_supervisor(self) -> None:
        control = self._launched.control
        try:
            self._hear_supervisor(control.receive())
            while control.pending():
                self._hear_supervisor(control.receive())
        except (EOFError, OSError) as error:
            if self.ended is not None:
                return
            if not self._started:
                raise NotStarted("The trial's processes did not start.") from error
            # The supervisor was killed; the kernel has killed the trial along with it.
            self.ended = Ended(exitcode=None)

    def _hear_supervisor(self, message: Any) -> None:
        if isinstance(message, Started):
            self._started = True
        elif isinstance(message, Breached):
            with self._sending:
                self._stopped_for = self._stopped_for or message.breach
        elif isinstance(message, Paused):
            _logger.warning(
                f"{self._label}'s process was stopped by a signal (SIGSTOP); it is killed unless "
                f"it goes on within {message.patience:g} s."
            )
        elif isinstance(message, Ended):
            self.ended = message

    def _serve_child(self) -> bool:
        """Handle what has arrived; return whether more may come."""
        channel = self._launched.channel
        try:
            self._handle(channel.receive())
            while channel.pending():
                self._handle(channel.receive())
        except (EOFError, ConnectionError):
            return False
        return True

    def _handle(self, message: Any) -> None:
        if type(message) is tuple:
            self._serve_call(message)
        elif isinstance(message, (Printed, WarningMessage, logging.LogRecord)):
            if isinstance(message, WarningMessage):
                self.shortage = self.shortage or find_shortage_in_text(str(message.message))
            try:
                replay(message)
            except Exception:
                _logger.exception(f"What {self._label} printed or logged could not be passed on.")
        elif isinstance(message, Ready):
            self.data_limit = message.data_limit
            self._on_ready(message)
        elif isinstance(message, (Returned, Raised, Exited, Unsendable)):
            with self._sending:
                self.outcome = message
            seconds = self._on_outcome()
            if seconds is not None:
                with self._sending, contextlib.suppress(OSError):
                    self._launched.control.send(Leave(seconds))

    def _serve_call(self, call: Call) -> None:
        try:
            answer = self._answer(call)
        except BaseException as error:
            # An interrupt (Ctrl-C). The objective, which waits for the answer, is to hear of it.
            with contextlib.suppress(OSError):
                self._send_answer((call[0], None, pack_error(error)))
            raise
        with contextlib.suppress(ConnectionError):
            self._send_answer(answer)
        _, target, name, args, kwargs = call
        if name == "report" and target == 0 and answer[2] is None and args is not None:
            self._on_report(int(args[1] if args[1:] else kwargs["step"]))

    def _answer(self, call: Call) -> Answer:
        number, index, name, args, kwargs = call
        try:
            if name == SYNC:
                return number, None, None
            if name == CHECK:
                return number, self._ask_breach(), None
            if name == MEASURE:
                self._measure()
                return number, None, None
            target = self._remote[index]
            if name == "__setattr__":
                setattr(target, *(args or ()))
                return number, None, None
            value = getattr(target, name)
            if args is not None:
                value = value(*args, **kwargs)
            elif callable(value) and not isinstance(value, type):
                value = Method()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the objective's to handle
            return number, None, pack_error(error)
        return number, self._remote.handle(value) if is_remote(value) else value, None

    def _send_answer(self, answer: Answer) -> None:
        try:
            self._launched.channel.send(answer)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the value can't be pickled
            self._launched.channel.send((answer[0], None, pack_error(error)))
