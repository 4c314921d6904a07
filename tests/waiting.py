"""How tests wait for what other threads and processes do."""

from __future__ import annotations

from collections.abc import Callable
import time


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"Nothing happened within {seconds:g} s."
        time.sleep(0.005)
