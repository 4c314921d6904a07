"""Remote calls: the trial, the study and its storage stay in the study's process.

The objective gets proxies, whose calls are sent to the server. A proxy can be passed to other
processes of the trial, each of which connects to the server on its first call, as a shared
connection would mix up answers. In the study's process, a proxy becomes the object itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

from optuna_quota._isolation.channel import Channel, dumps, SentError, unpack_error
from optuna_quota._usage import Breach


@dataclass(frozen=True)
class Handle:
    """Refers to an object of the study's process, by its index and its class."""

    index: int
    kind: type


@dataclass(frozen=True)
class TrialHandle(Handle):
    """Refers to the trial, with its constant attributes, which need no call."""

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
# Names of calls that are no methods: `optuna_quota.check` in a trial's process, a choice among
# objects, a measurement of what the trial uses at this moment, and a call without effect, whose
# answer says that all messages before it were handled.
CHECK = "_quota_check"
CHOOSE = "_quota_choose"
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
    """Return whether an object must stay in the study's process, as a copy would be another."""
    return isinstance(value, (Study, BaseStorage, Trial))


def suggest_object(trial: Any, name: str, choices: Sequence[Any]) -> tuple[int | None, Any]:
    """Suggest one of several objects; return its index, if it is one of them, and itself.

    Optuna compares choices with those of earlier trials, but copies of objects may not be equal.
    """
    with _choosing:
        study = getattr(trial, "study", None)  # a FixedTrial has none
        trials = [] if study is None else study.get_trials(deepcopy=False)
        known = next((d[name] for t in trials if name in (d := t.distributions)), None)
        former = getattr(known, "choices", ())
        if len(former) == len(choices) and all(map(_is_copy, former, choices)):
            choices = former
        found = trial.suggest_categorical(name, choices)
    return next((n for n, choice in enumerate(choices) if choice is found), None), found


_choosing = threading.Lock()


def _is_copy(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(dumps(value) == dumps(other))


# In the trial's processes.


class RpcClient:
    """Sends calls from one of the trial's processes, one at a time, from any thread.

    The first connection is that of the trial's own process. The polite stop is delayed by ``stop``
    until a message is exchanged.
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
        # Whether this is a copy in a process that was forked later.
        self.is_forked = False
        if address is not None:
            self.use(address)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._disconnect)

    def use(self, address: Address) -> None:
        """Connect to an address from now on, as this process's client for it."""
        self.address = address
        _clients[address] = self

    def _disconnect(self) -> None:
        """Drop the connections, which belong to the process that this one was forked from."""
        # A thread that this process lacks may have held it.
        self._lock = threading.RLock()
        self._depth = 0
        self.is_forked = True
        for channel in self._channels:
            channel.close()
        self._channels = []

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Channel]:
        with self._stop, self._lock:
            depth = self._depth
            if depth == len(self._channels):
                self._channels.append(connect(self.address))
            self._depth, channel = depth + 1, self._channels[depth]
            try:
                yield channel
            finally:
                self._depth = depth
                if channel.is_cut_off and channel in self._channels:
                    # Interrupted by a user's own signal handler, such as a timeout.
                    self._channels.remove(channel)
                    channel.close()

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
    """The value of an attribute that is a method, such as a subclass's."""


# Choices that Optuna can keep in any storage, and compare.
_STORABLE = (bool, int, float, str)

# The clients of this process by address. One trial's, unless trials are nested.
_clients: dict[Address, RpcClient] = {}


class Proxy:
    """Represents an object of the study's process in the trial's, as an instance of its class."""

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
    """The trial in its own process; attributes set there are not sent."""

    def __init__(self, calls: RpcClient, handle: TrialHandle) -> None:
        super().__init__(calls, handle)
        self.number = handle.number
        self.datetime_start = handle.datetime_start
        self._trial_id = handle.trial_id
        if handle.study is not None:
            self.study = Proxy(calls, handle.study)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        calls, handle = self._proxied
        if all(choice is None or isinstance(choice, _STORABLE) for choice in choices):
            return calls.call(handle.index, "suggest_categorical", name, choices)
        choices = tuple(choices)
        place, found = calls.call(handle.index, CHOOSE, name, choices)
        # The objective gets the one that it has, not a copy.
        return found if place is None else choices[place]

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
