"""What ends a command early, and with which exit status."""

from __future__ import annotations


OK = 0
FAILED = 1
USAGE = 2
OVER_QUOTA = 3
INTERRUPTED = 130


class UsageError(Exception):
    """What was typed can't be meant; the message says what would do."""
