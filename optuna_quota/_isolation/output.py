"""What a trial prints, logs and warns of comes out in the study's process, as if it ran there."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import copy
from dataclasses import dataclass
import io
import logging
import os
import pickle
import sys
from typing import Any
import warnings

import cloudpickle

from optuna_quota._isolation.rpc import RpcClient


# The name of a call that does nothing: its answer says that all before it was done.
SYNC = "_sync"


@dataclass(frozen=True)
class Printed:
    """Text for one of the standard streams."""

    stream: str
    text: str


@dataclass(frozen=True)
class Warned:
    """A warning that the filters let through."""

    message: Warning | str
    category: type[Warning]
    filename: str
    lineno: int


@dataclass(frozen=True)
class OutputRules:
    """How the study's process prints, logs and warns.

    Attributes:
        forwarded: The standard streams that were replaced, as in a notebook or by a test runner;
            the others are written to directly.
        encodings: Encoding and error handler of those written to directly.
        levels: Level and whether it is disabled, of each logger that has a say.
        handled: The loggers that have handlers, but for the root.
        disabled: The level up to which logging is off altogether.
        filters: ``warnings.filters``, each pickled: the categories may be of modules that are
            found only in the same surroundings.
    """

    forwarded: frozenset[str]
    encodings: Mapping[str, tuple[str, str]]
    levels: Mapping[str, tuple[int, bool]]
    handled: Sequence[str]
    disabled: int
    filters: Sequence[bytes]


def output_rules() -> OutputRules:
    """Return the rules of this process, and flush what it has printed so far."""
    forwarded, encodings = set(), {}
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original:
            forwarded.add(name)
        elif stream is not None:
            stream.flush()
            encodings[name] = (stream.encoding, stream.errors or "strict")
    loggers: dict[str, Any] = {"": logging.getLogger()}
    loggers.update(logging.Logger.manager.loggerDict)
    levels = {
        name: (logger.level, logger.disabled)
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and (logger.level or logger.disabled)
    }
    handled = [
        name
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and logger.handlers and logger.parent is not None
    ]
    return OutputRules(
        frozenset(forwarded),
        encodings,
        levels,
        handled,
        logging.Logger.manager.disable,
        [_pickle_filter(entry) for entry in warnings.filters],
    )


def _pickle_filter(entry: tuple[Any, ...]) -> bytes:
    if entry[2].__module__ != "__main__":
        with contextlib.suppress(pickle.PicklingError, AttributeError):
            return pickle.dumps(entry)
    # The script is not run again, nor is the function that made a class: these go by value.
    data: bytes = cloudpickle.dumps(entry)
    return data


def follow(
    rules: OutputRules, calls: RpcClient, sounding: Sequence[logging.Logger] | None = None
) -> None:
    """Print, log and warn by the rules of the study's process.

    Args:
        rules: The rules.
        calls: The way there.
        sounding: In a fork of that process, what :func:`sounding_loggers` gave there.
    """
    for name in ("stdout", "stderr"):
        if name in rules.forwarded:
            setattr(sys, name, ForwardedStream(name, calls))
        elif name in rules.encodings:
            stream = _open_stream(name, *rules.encodings[name])
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        else:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
    if sounding is None:
        _follow_logging(rules, calls)
    else:
        # Their levels are in force already, and going through all loggers would copy their pages.
        _silence(sounding)
        logging.getLogger().addHandler(ForwardingHandler(calls))
    defer_to_handlers(rules)
    _follow_warnings(rules, calls)


def defer_to_handlers(rules: OutputRules) -> None:
    """Leave what a logger has handlers for in the study's process to those.

    To be called again when modules were imported: what gives a logger its handlers there does so
    here as well, and each record would come out twice. That a logger has some is still seen.

    Args:
        rules: The rules.
    """
    for name in rules.handled:
        logger = logging.getLogger(name)
        logger.handlers[:] = [logging.NullHandler()]
        logger.propagate = True


def _open_stream(name: str, encoding: str, errors: str) -> io.TextIOBase:
    """Return a new stream: the template's own still takes its descriptor for a null device.

    A killed process can't flush, so each line is written as it ends.
    """
    handle = 1 if name == "stdout" else 2
    return open(handle, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)


def replay(message: Any) -> None:
    """Do in the study's process what the child could not: print, log or warn."""
    if isinstance(message, Printed):
        stream = getattr(sys, message.stream)
        if stream is not None:
            stream.write(message.text)
            stream.flush()
    elif isinstance(message, Warned):
        warnings.showwarning(message.message, message.category, message.filename, message.lineno)
    elif isinstance(message, logging.LogRecord):
        logger = logging.getLogger(message.name)
        heard = vars(message).pop(_HEARD, False)
        # The handler of last resort is for what nobody has heard of.
        if logger.isEnabledFor(message.levelno) and (logger.hasHandlers() or not heard):
            logger.handle(message)


class ForwardedStream(io.TextIOBase):
    """A standard stream that is written to in the study's process, line by line.

    Args:
        name: ``"stdout"`` or ``"stderr"``.
        calls: The way there.
    """

    def __init__(self, name: str, calls: RpcClient) -> None:
        self._name = name
        self._calls = calls
        self._pid = os.getpid()
        self._text = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here
        """The encoding that the descriptor underneath is written in."""
        return "utf-8"

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor that subprocesses write to."""
        return 1 if self._name == "stdout" else 2

    def write(self, text: str) -> int:
        """Write, and send on what is complete to the last line's end."""
        self._text += text
        if "\n" in text or "\r" in text or len(self._text) > 8192:
            self._send()
        return len(text)

    def flush(self) -> None:
        """Send on what was written, and wait until it is out.

        What subprocesses write to the descriptor afterwards then comes afterwards.
        """
        if self._text:
            self._send()
        if os.getpid() == self._pid:
            self._calls.call(0, SYNC)

    def _send(self) -> None:
        text, self._text = self._text, ""
        if os.getpid() == self._pid:
            self._calls.notify(Printed(self._name, text))
        else:
            # A process that the objective forked: the connection isn't its own.
            os.write(self.fileno(), text.encode("utf-8", "replace"))


class ForwardingHandler(logging.Handler):
    """Hands each record to the study's process, whose handlers deal with it.

    Args:
        calls: The way there.
    """

    def __init__(self, calls: RpcClient) -> None:
        super().__init__()
        self._calls = calls
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        try:
            if os.getpid() == self._pid:
                self._calls.notify(_portable(record))
            else:
                os.write(2, (self.format(record) + "\n").encode("utf-8", "replace"))
        except Exception:  # noqa: BLE001 - as every handler of the standard library does
            self.handleError(record)


def _portable(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record that any process can read: text in place of arguments and tracebacks."""
    sent = copy.copy(record)
    sent.msg = record.getMessage()
    sent.args = None
    if record.exc_info:
        sent.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        sent.exc_info = None
    for name in set(vars(sent)) - _STANDARD:
        value = getattr(sent, name)
        if not isinstance(value, (str, int, float, bool, type(None))):
            setattr(sent, name, repr(value))
    setattr(sent, _HEARD, _is_heard(record.name))
    return sent


def _is_heard(name: str) -> bool:
    """Return whether the trial itself has a handler for what a logger is given."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(not isinstance(h, _SILENT) for h in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


_HEARD = "_quota_heard"
_SILENT = (ForwardingHandler, logging.NullHandler)
_STANDARD = frozenset(vars(logging.makeLogRecord({})))


def blank_logging() -> None:
    """Let every logger pass all its records up to the root, which has no handler.

    Done once in the template: to go through all loggers in each trial would copy their pages.
    """
    global _is_blank
    loggers = _all_loggers()
    _silence(loggers)
    for logger in loggers:
        logger.disabled = False
        logger.level = logging.NOTSET
    # What loggers remember of their levels is forgotten by this, once for all of them.
    logging.getLogger().setLevel(logging.NOTSET)
    _is_blank = True


def sounding_loggers() -> list[logging.Logger]:
    """Return the loggers that do more than pass on to the root what they are given."""
    return [
        logger
        for logger in _all_loggers()
        if logger.handlers or logger.filters or not logger.propagate
    ]


def _all_loggers() -> list[logging.Logger]:
    known = list(logging.Logger.manager.loggerDict.values())
    return [logging.getLogger(), *(x for x in known if isinstance(x, logging.Logger))]


def _silence(loggers: Sequence[logging.Logger]) -> None:
    for logger in loggers:
        logger.handlers.clear()
        logger.filters.clear()
        logger.propagate = True


_is_blank = False


def _follow_logging(rules: OutputRules, calls: RpcClient) -> None:
    if not _is_blank:
        blank_logging()
    logging.getLogger().addHandler(ForwardingHandler(calls))
    for name, (level, disabled) in rules.levels.items():
        logger = logging.getLogger(name or None)
        # Not by setLevel, which goes through all loggers: nothing has been logged yet.
        logger.level = level
        logger.disabled = disabled
    if rules.disabled != logging.Logger.manager.disable:
        logging.disable(rules.disabled)


def _follow_warnings(rules: OutputRules, calls: RpcClient) -> None:
    warnings.resetwarnings()
    for data in rules.filters:
        # What can't be imported here is not raised here either.
        with contextlib.suppress(ImportError, AttributeError):
            warnings.filters.append(pickle.loads(data))  # type: ignore[attr-defined]  # a list

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        calls.notify(Warned(message, category, filename, lineno))

    warnings.showwarning = show
