"""Log by loguru and structlog as the script has configured them.

Both keep their configuration in the process. Records of loguru are sent to the study's handlers:
in the trial, it would log to standard error only, at every level, without levels that the script
has added. structlog's settings are applied in the trial itself.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from dataclasses import dataclass
import functools
import importlib
import math
import os
import sys
from typing import Any

from optuna_quota._isolation.channel import pack_error, SentError, unpack_error
from optuna_quota._isolation.modules import after_import
from optuna_quota._isolation.rpc import RpcClient


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


@dataclass(frozen=True)
class LoguruSettings:
    """How the study's process logs by loguru."""

    least: float  # The lowest level of its handlers, infinite without any
    levels: tuple[tuple[str, int, str, str], ...]


@dataclass(frozen=True)
class LoguruRecord:
    """A record, in plain objects."""

    level: str | int
    fields: Mapping[str, Any]
    file: tuple[str, str]
    process: tuple[int, str]
    thread: tuple[int, str]
    error: SentError | None


def read_loguru_settings() -> LoguruSettings | None:
    module: Any = sys.modules.get("loguru")
    # Public functions tell neither.
    core = getattr(getattr(module, "logger", None), "_core", None)
    levels = getattr(core, "levels", None)
    if not isinstance(levels, dict):
        return None
    found = tuple((x.name, x.no, x.color, x.icon) for x in list(levels.values()))
    return LoguruSettings(getattr(core, "min_level", 0), found)


def forward_loguru(settings: LoguruSettings | None, calls: RpcClient) -> None:
    """Send all records of this process to the study's handlers from now on."""
    if settings is not None:
        after_import("loguru", functools.partial(_forward, settings, calls))


def _forward(settings: LoguruSettings, calls: RpcClient, module: Any) -> None:
    logger = module.logger
    for name, number, color, icon in settings.levels:
        # The number of a known level can't be changed.
        with contextlib.suppress(TypeError, ValueError):
            logger.level(name, no=number, color=color, icon=icon)
    logger.remove()
    if math.isfinite(settings.least):
        sink = functools.partial(_send, calls, os.getpid())
        logger.add(sink, level=settings.least, format="{message}")


_PLAIN = ("elapsed", "function", "line", "message", "module", "name", "time")


def _send(calls: RpcClient, pid: int, message: Any) -> None:
    if os.getpid() != pid:
        # A process that the objective forked: the connection isn't its own.
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


def replay_loguru(sent: LoguruRecord) -> None:
    error = None if sent.error is None else unpack_error(sent.error)

    def fill(record: dict[str, Any]) -> None:
        extra = {**record["extra"], **sent.fields["extra"]}
        record.update(sent.fields, extra=extra)
        for name in ("file", "process", "thread"):
            record[name] = type(record[name])(*getattr(sent, name))

    logger = sys.modules["loguru"].logger
    logger.patch(fill).opt(exception=error).log(sent.level, sent.fields["message"])


def reduce_logger(value: Any) -> Any:
    """Reduce a logger of loguru without its handlers; None for anything else."""
    module: Any = sys.modules.get("loguru")
    if module is None or type(value) is not type(module.logger):
        return None
    return _make_logger, tuple(value._options)


def _make_logger(*options: Any) -> Any:
    logger: Any = importlib.import_module("loguru").logger
    return logger if not any(options) else type(logger)(logger._core, *options)
