"""Logs each warning about metering once in a process."""

from __future__ import annotations

import logging


_logger = logging.getLogger("optuna.quota.metering")
_logged: set[str] = set()


def warn_once(subject: str, message: str, *, level: int = logging.WARNING) -> None:
    """Log a message unless one on the same subject was logged before at this level or above.

    The level is INFO if no limit or quota needs what is missing.
    """
    keys = {f"{at}:{subject}" for at in (logging.INFO, logging.WARNING) if at >= level}
    if not keys & _logged:
        _logged.add(f"{level}:{subject}")
        _logger.log(level, message)


def forget_warnings() -> None:
    """Let every warning come once more; for tests."""
    _logged.clear()
