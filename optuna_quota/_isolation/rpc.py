"""Remote calls: the trial, the study and its storage stay in the study's process.

The objective gets proxies of them; each call is sent there and answered by the server. A proxy
can be handed to other processes of the trial, which connect to the server on their first call: a
connection serves one process, since answers to several would be mixed up. A proxy that comes back
to the study's process is the object itself there.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, field
import datetime
import functools
import itertools
import os
import secrets
import socket
import sys
import threading
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial

from optuna_quota._isolation.channel import Channel, SentError, unpack_error
from optuna_quota._usage import Breach


@dataclass(frozen=True)
class Handle:
    """Refers to an object of the study's process, by its index and the class it passes for."""

    index: int
    kind: type


@dataclass(frozen=True)
class TrialHandle(Handle):
    """Refers to the trial; has its attributes that never change: they need no call."""

    number: int
    trial_id: int | None
    datetime_start: datetime.datetime | None
    study: Handle | None


# A call: its id, the index of its target, the name, arguments (None to read an attribute), keyword
# arguments. The answer: the call's id, the value, the error. Plain tuples, because a pickled class
# costs as much as the rest of a round trip.
Call = tuple[int, int, str, "tuple[Any, ...] | None", "dict[str, Any]"]
Answer = tuple[int, Any, "SentError | None"]

# The index of the trial, which is the first of the remote objects.
TRIAL = 0
# Names of calls that are no methods: `optuna_quota.check` in a trial's process, a measurement of
# what the trial uses at this moment, and a call without effect, whose answer says that all
# messages before it were handled.
CHECK = "_quota_check"
MEASURE = "_quota_measure"
SYNC = "_quota_sync"


# Connections.

_KEY_SIZE = 32


@dataclass(frozen=True)
class Address:
    """Where to connect: an abstract name on Linux, host and port elsewhere.

    A connection sends the key first: other users of the machine may see the name.
    """

    name: Any
    key: bytes = field(repr=False)


def connect(address: Address) -> Channel:
    family = socket.AF_UNIX if isinstance(address.name, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.connect(address.name)
        sock.sendall(address.key)
    except BaseException:
        sock.close()
        raise
    return Channel(sock)


class Listener:
    """Accepts connections of one trial's processes, in the study's process."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            name: Any = f"\0optuna-quota-{secrets.token_hex(16)}"
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(name)
            self._sock.listen()
        else:
            self._sock = socket.create_server(("127.0.0.1", 0))
            name = self._sock.getsockname()
        self._sock.setblocking(False)
        self.address = Address(name, secrets.token_bytes(_KEY_SIZE))

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def accept(self) -> Channel | None:
        """Return a new connection, which is to begin with the key; None without one."""
        with contextlib.suppress(OSError):
            sock, _ = self._sock.accept()
            sock.setblocking(True)
            return Channel(sock, self.address.key)
        return None


# In the study's process.


class RemoteObjects:
    """The objects in the study's process that one trial may call, the trial first."""

    def __init__(self, trial: Any) -> None:
        self._objects: list[Any] = [trial]
        self.listener = Listener()
        _served[self.listener.address] = (os.getpid(), self)

    def close(self) -> None:
        _served.pop(self.listener.address, None)
        self.listener.close()

    def handle(self, found: Any) -> Handle:
        """Return the handle of an object, which is kept."""
        new = len(self._objects)
        index = next((i for i, known in enumerate(self._objects) if known is found), new)
        if index == new:
            self._objects.append(found)
        # Of a proxy, where trials are nested, the class that it passes for.
        return Handle(index, found.__class__)

    def __getitem__(self, index: int) -> Any:
        return self._objects[index]


# What this process serves by address, and its pid: a fork has it from its parent.
_served: dict[Address, tuple[int, RemoteObjects]] = {}


def is_remote(value: Any) -> bool:
    """Return whether an object belongs to the study's process: a copy of it would be another."""
    return isinstance(value, (Study, BaseStorage, Trial))


# In the trial's processes.


class RpcClient:
    """Sends calls from one of the trial's processes, one at a time, from any thread.

    It begins with the connection that the trial's own process has. The polite stop waits within
    ``stop`` until a message is exchanged.
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
        with self._connection() as channel:
            channel.send(message)

    def call(self, target: int, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._ask((next(self._ids), target, name, args, kwargs))

    def read(self, target: int, name: str) -> Any:
        return self._ask((next(self._ids), target, name, None, {}))

    def _ask(self, call: Call) -> Any:
        with self._connection() as channel:
            channel.send(call)
            number, value, error = channel.receive()
            # An exception of a user's own signal handler may have cut off an earlier call.
            while number != call[0]:
                number, value, error = channel.receive()
        if error is not None:
            raise unpack_error(error)
        if isinstance(value, Method):
            return functools.partial(self.call, *call[1:3])
        return Proxy(self, value) if isinstance(value, Handle) else value


@dataclass(frozen=True)
class Method:
    """The answer to the reading of an attribute that is a method, such as a subclass's."""


# The clients of this process by address. One trial's, unless trials are nested.
_clients: dict[Address, RpcClient] = {}


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
        known = getattr(handle.kind, name, None)
        if callable(known) and not isinstance(known, type):
            return functools.partial(calls.call, handle.index, name)
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


class RemoteTrial(Proxy):
    """The trial in its process; attributes that are set there stay there."""

    def __init__(self, calls: RpcClient, handle: TrialHandle) -> None:
        super().__init__(calls, handle)
        self.number = handle.number
        self.datetime_start = handle.datetime_start
        self._trial_id = handle.trial_id
        if handle.study is not None:
            self.study = Proxy(calls, handle.study)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def _quota_check(self) -> Breach | None:
        breach: Breach | None = self._proxied[0].call(TRIAL, CHECK)
        return breach


def proxy_at(address: Address, handle: Handle) -> Any:
    """Return the proxy of an object, or the object itself in its own process."""
    pid, objects = _served.get(address, (None, None))
    if objects is not None and pid == os.getpid():
        return objects[handle.index]
    calls = _clients.get(address) or RpcClient(address)
    return RemoteTrial(calls, handle) if isinstance(handle, TrialHandle) else Proxy(calls, handle)
