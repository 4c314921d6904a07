"""What the child asks of the study's process: calls with an answer, and notices without."""

from __future__ import annotations

from dataclasses import dataclass
import itertools
import os
import threading
from typing import Any
from typing import NoReturn

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.remote_errors import SentError
from optuna_quota._isolation.remote_errors import unpack_error
from optuna_quota._isolation.stop import PoliteStop


@dataclass(frozen=True)
class Handle:
    """An object that stays in the study's process; the child has a proxy.

    Attributes:
        index: Its place among the objects that the child knows.
        kind: The class that the proxy passes for.
    """

    index: int
    kind: type


# A call: its id, the index of its target, the name, arguments (None to read an attribute), named
# arguments. The answer: the call's id, the value, the error. Plain tuples, because a pickled class
# costs as much as the rest of a round trip.
Call = tuple[int, int, str, "tuple[Any, ...] | None", "dict[str, Any]"]
Answer = tuple[int, Any, "SentError | None"]


@dataclass(frozen=True)
class Method:
    """Says in an answer that the attribute is a method of its object."""


class Calls:
    """The child's end: one call at a time, from any thread.

    Args:
        channel: The connection.
        stop: Keeps the polite stop back while a message is exchanged.
    """

    def __init__(self, channel: Channel, stop: PoliteStop) -> None:
        self._channel = channel
        self._stop = stop
        self._ids = itertools.count()
        global _calls
        _calls = self
        self._renew_locks()
        if hasattr(os, "register_at_fork"):
            # A thread may hold them at a fork in the objective; the fork has no such thread.
            os.register_at_fork(after_in_child=self._renew_locks)

    def _renew_locks(self) -> None:
        self._calling = threading.RLock()
        self._sending = threading.RLock()

    def notify(self, message: Any) -> None:
        """Send a message that has no answer."""
        with self._stop, self._sending:
            self._channel.send(message)

    def call(self, target: int, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of an object in the study's process and return what it returns."""
        return self._ask((next(self._ids), target, name, args, kwargs))

    def read(self, target: int, name: str) -> Any:
        """Return an attribute of an object in the study's process."""
        value = self._ask((next(self._ids), target, name, None, {}))
        if isinstance(value, Method):
            return lambda *args, **kwargs: self.call(target, name, *args, **kwargs)
        return value

    def _ask(self, call: Call) -> Any:
        with self._stop, self._calling:
            with self._sending:
                self._channel.send(call)
            number, value, error = self._channel.receive()
            # An exception of a user's own signal handler may have cut off an earlier call.
            while number != call[0]:
                number, value, error = self._channel.receive()
        if error is not None:
            raise unpack_error(error)
        return Proxy(self, value) if isinstance(value, Handle) else value


class Proxy:
    """Stands in the child for an object of the study's process, such as the study.

    It passes for an instance of that object's class; all it does is done over there.
    """

    def __init__(self, calls: Calls, handle: Handle) -> None:
        self.__dict__["_proxied"] = (calls, handle)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind: type = self.__dict__["_proxied"][1].kind
        return kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        calls, handle = self.__dict__["_proxied"]
        return calls.read(handle.index, name)

    def __setattr__(self, name: str, value: Any) -> None:
        calls, handle = self.__dict__["_proxied"]
        calls.call(handle.index, "__setattr__", name, value)

    def __repr__(self) -> str:
        handle = self.__dict__["_proxied"][1]
        return f"<{handle.kind.__name__} in the study's process>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can't be sent to another process.")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__reduce__()


class RemoteObjects:
    """The objects of one trial that stay in the study's process and are called from the child.

    Args:
        trial: The trial, which is the first of them.
    """

    def __init__(self, trial: Any) -> None:
        self._objects: list[Any] = [trial]

    def handle(self, found: Any) -> Handle:
        """Return the handle of an object, which stays."""
        for index, known in enumerate(self._objects):
            if known is found:
                return Handle(index, type(found))
        self._objects.append(found)
        return Handle(len(self._objects) - 1, type(found))

    def __getitem__(self, index: int) -> Any:
        return self._objects[index]


def is_remote(value: Any) -> bool:
    """Return whether an object belongs to the study's process: a copy of it would be another."""
    return isinstance(value, (Study, BaseStorage, Trial))


def proxy_of(handle: Handle) -> Proxy:
    """Return the proxy of an object that stayed behind; pickles of objectives refer to this."""
    assert _calls is not None
    return Proxy(_calls, handle)


# Those of this process, where it runs a trial.
_calls: Calls | None = None
