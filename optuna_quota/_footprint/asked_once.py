"""A user's footprint function, called once for each point."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from statistics import median
import time
from typing import Any

from optuna_quota._resources import Usage


# Then the answers are forgotten: one takes about a kilobyte.
_MOST_KNOWN = 10_000
# Seconds after which a point that failed is asked again: a service may have been away.
_FAILURE_LASTS = 10.0
# Calls that show how long the next one takes; the first may import a library.
_N_TIMED = 3


class AskedOnce:
    """A function from params to a usage that remembers its answers, and failures for a while.

    Args:
        function: The user's function.
    """

    def __init__(self, function: Callable[[Mapping[str, Any]], Usage]) -> None:
        self._function = function
        self._known: dict[Hashable, tuple[Any, float]] = {}
        self._times: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the answers out of a copy, which may run on another machine."""
        return {"_function": self._function, "_known": {}, "_times": []}

    def __call__(self, params: Mapping[str, Any]) -> Any:
        """Return what the function returns, or raise what it raised, for these parameters."""
        key = _key(params)
        found, since = self._known.get(key, (None, 0.0))
        is_failure = isinstance(found, Exception)
        if found is None or (is_failure and time.monotonic() - since > _FAILURE_LASTS):
            found = self._ask(params)
            if len(self._known) >= _MOST_KNOWN:
                self._known = {}
            self._known[key] = found, time.monotonic()
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    def _ask(self, params: Mapping[str, Any]) -> Any:
        started = time.perf_counter()
        try:
            return self._function(dict(params))
        except Exception as error:  # noqa: BLE001 - the user's own, raised to who asks
            return error
        finally:
            self._times = [*self._times[1 - _N_TIMED :], time.perf_counter() - started]

    @property
    def seconds(self) -> float | None:
        """How long the next call is likely to take; None before there were some."""
        return median(self._times) if len(self._times) == _N_TIMED else None


def _key(params: Mapping[str, Any]) -> Hashable:
    # True equals 1, but is another choice.
    items = tuple((name, isinstance(params[name], bool), params[name]) for name in sorted(params))
    try:
        hash(items)
    except TypeError:
        return repr(items)
    return items
