"""Remote calls: the trial, the study and its storage stay in the study's process.

The objective gets proxies of them; each call is sent there and answered by the server. A proxy
can be handed to other processes of the trial, which connect to the server on their first call. One
that comes back to the study's process is the object itself there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from dataclasses import dataclass
import datetime
import itertools
import os
import threading
from typing import Any, TYPE_CHECKING

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.listener import Address, connect, Listener
from optuna_quota._isolation.remote_errors import SentError, unpack_error


if TYPE_CHECKING:
    from optuna_quota._resources import Breach


@dataclass(frozen=True)
class Handle:
    """Refers to an object of the study's process.

    Attributes:
        index: Its index in :class:`RemoteObjects`.
        kind: The class that its proxy passes for.
    """

    index: int
    kind: type


# A call: its id, the index of its target, the name, arguments (None to read an attribute), keyword
# arguments. The answer: the call's id, the value, the error. Plain tuples, because a pickled class
# costs as much as the rest of a round trip.
Call = tuple[int, int, str, "tuple[Any, ...] | None", "dict[str, Any]"]
Answer = tuple[int, Any, "SentError | None"]

# The index of the trial, which is the first of the remote objects.
TRIAL = 0
# Names of calls that are no methods: `optuna_quota.check` in a trial's process, and a measurement
# of what the trial uses at this moment.
CHECK = "_quota_check"
MEASURE = "_quota_measure"


@dataclass(frozen=True)
class Method:
    """The answer to the reading of an attribute that is a method."""


class RpcClient:
    """Sends calls from one of the trial's processes, one at a time, from any thread.

    Args:
        address: Where to connect.
        channel: A connection to begin with, that of the trial's own process.
        stop: A context in which the polite stop waits until a message is exchanged.
    """

    def __init__(
        self,
        address: Address | None = None,
        channel: Channel | None = None,
        stop: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self._stop = stop or contextlib.nullcontext()
        self._ids = itertools.count()
        # One for each depth: a signal handler may call within a call of its thread, and what it
        # sends and receives must not mix with that.
        self._channels = [] if channel is None else [channel]
        self._depth = 0
        self._lock = threading.RLock()
        if address is not None:
            self.use(address)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._disconnect)

    def use(self, address: Address) -> None:
        """Connect there from now on, and be this process's client for it."""
        self.address = address
        _clients[address] = self

    def _disconnect(self) -> None:
        """Leave the connections to the process that this one was forked from."""
        # Another thread may have held it, which this process lacks.
        self._lock = threading.RLock()
        self._depth = 0
        for channel in self._channels:
            channel.close()
        self._channels = []

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Channel]:
        with self._stop, self._lock:
            depth = self._depth
            if depth == len(self._channels):
                self._channels.append(connect(self.address))
            self._depth = depth + 1
            try:
                yield self._channels[depth]
            finally:
                self._depth = depth

    def notify(self, message: Any) -> None:
        """Send a message that has no answer."""
        with self._connection() as channel:
            channel.send(message)

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
        with self._connection() as channel:
            channel.send(call)
            number, value, error = channel.receive()
            # An exception of a user's own signal handler may have cut off an earlier call.
            while number != call[0]:
                number, value, error = channel.receive()
        if error is not None:
            raise unpack_error(error)
        return Proxy(self, value) if isinstance(value, Handle) else value


# The clients of this process by address. One trial's, unless trials are nested.
_clients: dict[Address, RpcClient] = {}


def _client(address: Address) -> RpcClient:
    return _clients.get(address) or RpcClient(address)


class Proxy:
    """Stands in the trial's process for an object of the study's, and passes for its class."""

    def __init__(self, calls: RpcClient, handle: Handle) -> None:
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

    def __reduce__(self) -> tuple[Any, ...]:
        calls, handle = self.__dict__["_proxied"]
        return proxy_at, (calls.address, handle)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


class RemoteObjects:
    """The objects in the study's process that one trial may call, the trial first.

    Args:
        trial: The trial.

    Attributes:
        listener: Where the trial's processes connect.
    """

    def __init__(self, trial: Any) -> None:
        self._objects: list[Any] = [trial]
        self.listener = Listener()
        _served[self.listener.address] = (os.getpid(), self)

    def close(self) -> None:
        """Serve no more: the trial has ended."""
        _served.pop(self.listener.address, None)
        self.listener.close()

    def handle(self, found: Any) -> Handle:
        """Return the handle of an object, which is kept."""
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


# What this process serves by address, and its pid: a fork has it from its parent.
_served: dict[Address, tuple[int, RemoteObjects]] = {}


def _served_here(address: Address) -> RemoteObjects | None:
    pid, objects = _served.get(address, (None, None))
    return objects if pid == os.getpid() else None


def proxy_at(address: Address, handle: Handle) -> Any:
    """Return the proxy of an object, or the object itself in its own process."""
    objects = _served_here(address)
    return Proxy(_client(address), handle) if objects is None else objects[handle.index]


def trial_at(facts: TrialFacts) -> Any:
    """Return the remote trial, or the trial itself in its own process."""
    objects = _served_here(facts.address)
    return RemoteTrial(_client(facts.address), facts) if objects is None else objects[TRIAL]


@dataclass(frozen=True)
class TrialFacts:
    """Where a trial is served, and its attributes that never change: they need no call."""

    address: Address
    number: int
    trial_id: int | None
    datetime_start: datetime.datetime | None
    study: Handle | None


class RemoteTrial(Trial):
    """An :class:`optuna.trial.Trial` whose methods run in the study's process."""

    def __init__(self, calls: RpcClient, facts: TrialFacts) -> None:
        # The base class's own is not called: it would ask the sampler a second time.
        self._calls = calls
        self._facts = facts
        self._trial_id = facts.trial_id  # type: ignore[assignment]  # None for a FixedTrial
        if facts.study is not None:
            self.study = Proxy(calls, facts.study)  # type: ignore[assignment]  # passes for one

    @property
    def number(self) -> int:
        """The trial's number."""
        return self._facts.number

    @property
    def datetime_start(self) -> datetime.datetime | None:
        """When the trial started."""
        return self._facts.datetime_start

    def _quota_check(self) -> Breach | None:
        breach: Breach | None = self._calls.call(TRIAL, CHECK)
        return breach

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_calls", "_facts"):
            raise AttributeError(name)
        return self._calls.read(TRIAL, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return trial_at, (self._facts,)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _method(name: str) -> Callable[..., Any]:
    def forward(self: RemoteTrial, *args: Any, **kwargs: Any) -> Any:
        return self._calls.call(TRIAL, name, *args, **kwargs)

    forward.__name__ = name
    forward.__doc__ = getattr(Trial, name).__doc__
    return forward


def _attribute(name: str) -> property:
    return property(lambda self: self._calls.read(TRIAL, name))


# Every public method and property of a trial, those of later versions of Optuna too.
for _name in dir(Trial):
    if not _name.startswith("_") and _name not in vars(RemoteTrial):
        _is_method = callable(getattr(Trial, _name))
        setattr(RemoteTrial, _name, _method(_name) if _is_method else _attribute(_name))
