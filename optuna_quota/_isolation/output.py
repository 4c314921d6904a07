"""Forward what a trial prints, logs and warns to the study's process, under the study's settings.

:class:`logging.handlers.QueueHandler` can't be used: it appends the traceback to the message, but
the study's handlers expect it in a field of its own. Records of loguru are sent as well: in the
trial, it would log to standard error only, at every level, without levels that the script added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from dataclasses import dataclass
import functools
import io
import itertools
import logging
import math
import operator
import os
import sys
from typing import Any, NamedTuple
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
    """A warning, sent like an error: its class may exist only in the trial."""

    warning: SentError
    file: str
    line: int
    text: str
    repeats: bool  # Whether a filter may show it each time, not once


@dataclass(frozen=True)
class LoguruRecord:
    """A record of loguru, in plain objects."""

    level: str | int
    fields: Mapping[str, Any]
    file: tuple[str, str]
    process: tuple[int, str]
    thread: tuple[int, str]
    error: SentError | None


class LoguruSettings(NamedTuple):
    """How the study's process logs by loguru."""

    least: float  # The lowest level of its handlers, infinite without any
    levels: Sequence[tuple[str, int, str, str]]  # Each by name, number, color and icon


@dataclass(frozen=True)
class OutputSettings:
    """How the study's process prints, logs and warns."""

    # The standard streams that were replaced, as in a notebook or by a test runner; trials write
    # to the others directly
    forwarded: frozenset[str]
    # Encoding and error handler of the latter
    encodings: Mapping[str, tuple[str, str]]
    # Level and whether it is disabled, of each logger where these are set
    levels: Mapping[str, tuple[int, bool]]
    handled: Sequence[str]  # The loggers that have handlers, except for the root logger
    disabled: int  # The level up to which logging is off altogether
    # ``warnings.filters``, with names instead of categories
    filters: Sequence[tuple[str, Any, str, Any, int]]
    loguru: LoguruSettings | None  # None where it is not loaded


def read_output_settings() -> OutputSettings:
    """Return the settings of this process, and flush its output."""
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
        loguru=_read_loguru(),
    )


def apply_output_settings(settings: OutputSettings, calls: RpcClient) -> None:
    """Make this trial's process print, log and warn in the study's process, by its settings."""
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
        repeats = any(
            action in ("always", "all") and issubclass(type(warning), kind)
            for action, _, kind, *_ in warnings.filters
        )
        calls.notify(Warned(pack_error(warning), filename, lineno, str(warning), repeats))

    warnings.showwarning = show
    warnings.resetwarnings()
    _from_study.clear()
    apply_to_new_modules(settings)


def apply_to_new_modules(settings: OutputSettings) -> None:
    """Apply the settings that depend on modules, again after some were imported.

    Code that adds handlers to a logger in the study's process does so in the trial's as well, and
    each record would be handled twice. So only the study's handlers are kept.
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
    """Return a new stream: that of the fork server was opened on a null device.

    A killed process can't flush, so each line is written at once.
    """
    handle = 1 if name == "stdout" else 2
    return open(handle, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)


def _is_to_show(message: Warned) -> bool:
    """Return whether a warning was not shown for an earlier trial, or is to be shown each time.

    As in one process, where changed filters start anew.
    """
    if _shown_by != warnings.filters:
        _shown_by[:] = warnings.filters
        _shown.clear()
    key = (message.file, message.line, message.text)
    is_new = key not in _shown
    _shown.add(key)
    return is_new or message.repeats


_shown: set[tuple[str, int, str]] = set()
_shown_by: list[Any] = []


Output = Printed | Warned | logging.LogRecord | LoguruRecord


def replay_output(message: Output) -> None:
    if isinstance(message, Printed):
        stream = getattr(sys, message.stream)
        if stream is not None:
            stream.write(message.text)
            stream.flush()
    elif isinstance(message, Warned):
        if _is_to_show(message):
            warning: Any = unpack_error(message.warning)
            warnings.showwarning(warning, type(warning), message.file, message.line)
    elif isinstance(message, LoguruRecord):
        _replay_loguru(message)
    else:
        logger = logging.getLogger(message.name)
        handled = vars(message).pop(_HANDLED, False)
        # The handler of last resort is for records without another handler.
        if logger.isEnabledFor(message.levelno) and (logger.hasHandlers() or not handled):
            logger.handle(message)


class ForwardedStream(io.TextIOBase):
    """A standard stream whose lines are written in the study's process."""

    # That of the descriptor underneath.
    encoding = "utf-8"

    def __init__(self, name: str, calls: RpcClient) -> None:
        self._name = name
        self._calls = calls
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
        """Send the text, and wait until it is printed.

        Later output of subprocesses, which write to the descriptor, then appears after it.
        """
        if self._text:
            self._send()
        if not self._calls.is_forked:
            self._calls.call(TRIAL, SYNC)

    def _send(self) -> None:
        text, self._text = self._text, ""
        if self._calls.is_forked:
            os.write(self.fileno(), text.encode("utf-8", "replace"))
        else:
            self._calls.notify(Printed(self._name, text))


class ForwardingHandler(logging.Handler):
    """Sends records to the study's process, whose handlers receive them."""

    def __init__(self, calls: RpcClient) -> None:
        super().__init__()
        self._calls = calls

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._calls.is_forked:
                os.write(2, (self.format(record) + "\n").encode("utf-8", "replace"))
            else:
                self._calls.notify(_portable(record))
        except Exception:  # noqa: BLE001 - as every handler of the standard library does
            self.handleError(record)


_SIMPLE = (str, int, float, complex, bytes, type(None))


def portable(value: Any, depth: int = 5) -> Any:
    """Return a value that any process can read: its ``repr`` unless it is plain data."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, _SIMPLE) or (numpy is not None and isinstance(value, numpy.generic)):
        return value if type(value).__module__ in ("builtins", "numpy") else repr(value)
    if depth and type(value) is dict:
        return {portable(k, 0): portable(v, depth - 1) for k, v in value.items()}
    if depth and type(value) in (list, tuple):
        return type(value)(portable(item, depth - 1) for item in value)
    return repr(value)


def _portable(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record that any process can read: with text for arguments and tracebacks."""
    text = record.exc_text
    if record.exc_info and not text:
        text = logging.Formatter().formatException(record.exc_info)
    fields: dict[str, Any] = {name: portable(value) for name, value in vars(record).items()}
    # Some handlers, such as those of structlog, accept a dictionary instead of a text.
    is_text = type(record.msg) is not dict or record.args
    message = record.getMessage() if is_text else portable(record.msg)
    fields.update(msg=message, args=None, exc_info=None, exc_text=text)
    fields[_HANDLED] = _is_handled(logging.getLogger(record.name))
    return logging.makeLogRecord(fields)


def _is_handled(logger: logging.Logger | None) -> bool:
    """Return whether the trial itself has a handler for a logger's records."""
    own = (ForwardingHandler, logging.NullHandler)
    while logger is not None:
        if any(not isinstance(handler, own) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


_HANDLED = "_quota_handled"


def prepare_logging(*, reset: bool) -> None:
    """Find the loggers that trials reset, before forks; ``reset`` them if no code logs here.

    Going through all loggers in each trial would copy their memory pages.
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
    """Make every logger pass its records to the root logger, which has no handler."""
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


# Loguru, whose functions don't tell its settings.


def _read_loguru() -> LoguruSettings | None:
    core = getattr(getattr(sys.modules.get("loguru"), "logger", None), "_core", None)
    levels = getattr(core, "levels", None)
    if not isinstance(levels, dict):
        return None
    found = [(x.name, x.no, x.color, x.icon) for x in list(levels.values())]
    return LoguruSettings(getattr(core, "min_level", 0), found)


def forward_loguru(settings: OutputSettings, calls: RpcClient) -> None:
    """Send all records of this process to the study's handlers from now on."""
    if settings.loguru is not None:
        after_import("loguru", functools.partial(_forward_loguru, settings.loguru, calls))


def _forward_loguru(settings: LoguruSettings, calls: RpcClient, module: Any) -> None:
    logger = module.logger
    for name, number, color, icon in settings.levels:
        # The number of a known level can't be changed.
        with contextlib.suppress(TypeError, ValueError):
            logger.level(name, no=number, color=color, icon=icon)
    logger.remove()
    if math.isfinite(settings.least):
        sink = functools.partial(_send_loguru, calls)
        logger.add(sink, level=settings.least, format="{message}")


_PLAIN = ("elapsed", "function", "line", "message", "module", "name", "time")


def _send_loguru(calls: RpcClient, message: Any) -> None:
    if calls.is_forked:
        os.write(2, str(message).encode("utf-8", "replace"))
        return
    record = message.record
    level, exception = record["level"], record["exception"]
    error = None if exception is None else exception.value
    calls.notify(
        LoguruRecord(
            level.no if level.name == f"Level {level.no}" else level.name,
            {**{name: record[name] for name in _PLAIN}, "extra": portable(record["extra"])},
            (record["file"].name, record["file"].path),
            (record["process"].id, record["process"].name),
            (record["thread"].id, record["thread"].name),
            None if error is None else pack_error(error.with_traceback(exception.traceback)),
        )
    )


def _replay_loguru(sent: LoguruRecord) -> None:
    error = None if sent.error is None else unpack_error(sent.error)

    def fill(record: dict[str, Any]) -> None:
        extra = {**record["extra"], **sent.fields["extra"]}
        record.update(sent.fields, extra=extra)
        for name in ("file", "process", "thread"):
            record[name] = type(record[name])(*getattr(sent, name))

    logger = sys.modules["loguru"].logger
    logger.patch(fill).opt(exception=error).log(sent.level, sent.fields["message"])
