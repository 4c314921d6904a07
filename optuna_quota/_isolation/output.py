"""Forward what a trial prints, logs and warns to the study's process, under the study's settings.

:class:`logging.handlers.QueueHandler` does not serve: it appends a traceback to the message, where
handlers of the study expect it in a field of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass
import io
import itertools
import logging
import operator
import os
import sys
from typing import Any
import warnings

from optuna_quota._isolation.channel import pack_error, SentError, unpack_error
from optuna_quota._isolation.modules import after_import
from optuna_quota._isolation.rpc import RpcClient, SYNC, TRIAL


@dataclass(frozen=True)
class Printed:
    stream: str
    text: str


@dataclass(frozen=True)
class Warned:
    """A warning, in the form of an error: only the trial may know its class."""

    warning: SentError
    file: str
    line: int


@dataclass(frozen=True)
class OutputSettings:
    """How the study's process prints, logs and warns."""

    # The standard streams that were replaced, as in a notebook or by a test runner; the others are
    # written to directly
    forwarded: frozenset[str]
    # Encoding and error handler of those written to directly
    encodings: Mapping[str, tuple[str, str]]
    # Level and whether it is disabled, of each logger where these are set
    levels: Mapping[str, tuple[int, bool]]
    handled: Sequence[str]  # The loggers that have handlers, except for the root logger
    disabled: int  # The level up to which logging is off altogether
    # ``warnings.filters``, with the names of the categories in their places
    filters: Sequence[tuple[str, Any, str, Any, int]]


def read_output_settings() -> OutputSettings:
    """Return the settings of this process, and flush what it has printed so far."""
    forwarded, encodings = set(), {}
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original:
            forwarded.add(name)
        elif stream is not None and not stream.closed:
            stream.flush()
            encodings[name] = (stream.encoding, stream.errors or "strict")
    root, *others = _all_loggers()
    filters: Sequence[Any] = warnings.filters
    return OutputSettings(
        frozenset(forwarded),
        encodings,
        levels={x.name: (x.level, x.disabled) for x in [root, *others] if x.level or x.disabled},
        handled=[logger.name for logger in others if logger.handlers],
        disabled=logging.Logger.manager.disable,
        filters=[
            (action, message, f"{kind.__module__}:{kind.__qualname__}", module, line)
            for action, message, kind, module, line in filters
        ],
    )


def apply_output_settings(settings: OutputSettings, calls: RpcClient) -> None:
    """Print, log and warn in the study's process and by its settings, in the trial's process."""
    for name in ("stdout", "stderr"):
        if name in settings.forwarded:
            setattr(sys, name, ForwardedStream(name, calls))
        else:
            stream = None
            if name in settings.encodings:
                stream = _open_stream(name, *settings.encodings[name])
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    if _to_reset is None:
        prepare_logging(reset=False)
    _reset_loggers()
    logging.getLogger().addHandler(ForwardingHandler(calls))
    for name, (level, disabled) in settings.levels.items():
        logger = logging.getLogger(name)
        # Not by `setLevel`, which goes through all loggers: nothing has been logged yet.
        logger.level = level
        logger.disabled = disabled
    if settings.disabled != logging.Logger.manager.disable:
        logging.disable(settings.disabled)

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        warning = message if isinstance(message, Warning) else category(message)
        calls.notify(Warned(pack_error(warning), filename, lineno))

    warnings.showwarning = show
    warnings.resetwarnings()
    _from_study.clear()
    apply_to_new_modules(settings)


def apply_to_new_modules(settings: OutputSettings) -> None:
    """Apply the settings that depend on modules, again after some were imported.

    Code that gives a logger its handlers in the study's process does so in the trial's as well,
    and each record would be handled twice: there, only the study's handlers are kept.
    """
    for name in settings.handled:
        logger = logging.getLogger(name)
        # Libraries look whether their logger has a handler.
        logger.handlers[:] = [logging.NullHandler()]
        logger.propagate = True
    found = []
    for action, message, kind, module, line in settings.filters:
        owner, _, path = kind.partition(":")
        if owner in sys.modules:
            with contextlib.suppress(AttributeError):  # one that was defined in a function
                category = operator.attrgetter(path)(sys.modules[owner])
                found.append((action, message, category, module, line))
        else:
            # Not imported for its filter: scipy, which the models load, takes 150 ms.
            _apply_after_import(owner, settings)
    # Filters of modules that only the trial has imported were set last, so they come first.
    own = [entry for entry in warnings.filters if entry not in _from_study]
    _from_study[:] = found
    warnings.resetwarnings()
    warnings.filters.extend([*own, *found])  # type: ignore[attr-defined]  # a list


def _apply_after_import(module: str, settings: OutputSettings) -> None:
    """Apply filters once a module is imported, and again after each package that it is in.

    A package sets filters of its own for the categories of its modules; the study's come first.
    """
    for name in itertools.accumulate(module.split("."), lambda package, name: f"{package}.{name}"):
        if name not in sys.modules and name not in _awaited:
            _awaited.add(name)
            after_import(name, lambda _: apply_to_new_modules(settings))


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


def _open_stream(name: str, encoding: str, errors: str) -> io.TextIOBase:
    """Return a new stream: the fork server's takes its descriptor for a null device's.

    A killed process can't flush, so each line is written as it ends.
    """
    handle = 1 if name == "stdout" else 2
    return open(handle, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)


def replay(message: Printed | Warned | logging.LogRecord) -> None:
    if isinstance(message, Printed):
        stream = getattr(sys, message.stream)
        if stream is not None:
            stream.write(message.text)
            stream.flush()
    elif isinstance(message, Warned):
        warning: Any = unpack_error(message.warning)
        warnings.showwarning(warning, type(warning), message.file, message.line)
    else:
        logger = logging.getLogger(message.name)
        handled = vars(message).pop(_HANDLED, False)
        # The handler of last resort is for records without any handler.
        if logger.isEnabledFor(message.levelno) and (logger.hasHandlers() or not handled):
            logger.handle(message)


class ForwardedStream(io.TextIOBase):
    """A standard stream that is written to in the study's process, line by line."""

    # That of the descriptor underneath.
    encoding = "utf-8"

    def __init__(self, name: str, calls: RpcClient) -> None:
        self._name = name
        self._calls = calls
        self._pid = os.getpid()
        self._text = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1 if self._name == "stdout" else 2

    def write(self, text: str) -> int:
        self._text += text
        if "\n" in text or "\r" in text or len(self._text) > 8192:
            self._send()
        return len(text)

    def flush(self) -> None:
        """Send the text that was written, and wait until it is printed.

        Output that subprocesses write to the descriptor afterwards then appears after it.
        """
        if self._text:
            self._send()
        if os.getpid() == self._pid:
            self._calls.call(TRIAL, SYNC)

    def _send(self) -> None:
        text, self._text = self._text, ""
        if os.getpid() == self._pid:
            self._calls.notify(Printed(self._name, text))
        else:
            # A process that the objective forked: the connection isn't its own.
            os.write(self.fileno(), text.encode("utf-8", "replace"))


class ForwardingHandler(logging.Handler):
    """Sends records to the study's process, whose handlers receive them."""

    def __init__(self, calls: RpcClient) -> None:
        super().__init__()
        self._calls = calls
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if os.getpid() == self._pid:
                self._calls.notify(_portable(record))
            else:
                os.write(2, (self.format(record) + "\n").encode("utf-8", "replace"))
        except Exception:  # noqa: BLE001 - as every handler of the standard library does
            self.handleError(record)


def _portable(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record that any process can read: text in place of arguments and tracebacks."""
    text = record.exc_text
    if record.exc_info and not text:
        text = logging.Formatter().formatException(record.exc_info)
    simple = (str, int, float, type(None))
    fields: dict[str, Any] = {
        name: value if isinstance(value, simple) else repr(value)
        for name, value in vars(record).items()
    }
    fields.update(msg=record.getMessage(), args=None, exc_info=None, exc_text=text)
    fields[_HANDLED] = _is_handled(logging.getLogger(record.name))
    return logging.makeLogRecord(fields)


def _is_handled(logger: logging.Logger | None) -> bool:
    """Return whether the trial itself has a handler for the records of a logger."""
    own = (ForwardingHandler, logging.NullHandler)
    while logger is not None:
        if any(not isinstance(handler, own) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


_HANDLED = "_quota_handled"


def prepare_logging(*, reset: bool) -> None:
    """Find the loggers that trials are to reset, before forks; ``reset`` them where none logs.

    To go through all loggers in each trial would copy the memory pages of all of them.
    """
    global _to_reset
    root = logging.getLogger()
    # Clears what all loggers have cached of their levels.
    root.setLevel(root.level)
    _to_reset = [
        x
        for x in _all_loggers()
        if x.handlers or x.filters or x.level or x.disabled or not x.propagate
    ]
    if reset:
        _reset_loggers()


_to_reset: list[logging.Logger] | None = None
_from_study: list[tuple[Any, ...]] = []
# Modules and packages whose import is awaited.
_awaited: set[str] = set()


def _reset_loggers() -> None:
    """Let every logger pass all its records on to the root logger, which has no handler."""
    global _to_reset
    loggers, _to_reset = _to_reset or [], []
    for logger in [logging.getLogger(), *loggers]:
        logger.handlers.clear()
        logger.filters.clear()
        logger.propagate = True
        logger.disabled = False
        logger.level = logging.NOTSET


def _all_loggers() -> list[logging.Logger]:
    known = list(logging.Logger.manager.loggerDict.values())
    return [logging.getLogger(), *(x for x in known if isinstance(x, logging.Logger))]
