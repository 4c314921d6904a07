"""Messages between the processes of an isolated trial: pickles over a stream socket.

Exceptions keep their type, causes and traceback. Pickling alone drops the traceback and fails for
many exceptions. multiprocessing attaches the traceback as text, which hides the real cause and
lacks source lines of notebook cells, known only in the study's process. So the position of each
frame is sent, and rebuilt as a real traceback.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
import contextlib
from dataclasses import dataclass
import hmac
import io
import itertools
import pickle
import socket
import struct
import sys
from types import FrameType, TracebackType
from typing import Any

import psutil


_HEADER = struct.Struct("!Q")
_CHUNK = 1 << 16
# The most descriptors in one message, see unix(7).
_MAX_DESCRIPTORS = 253
# Seconds for a supervisor that has reported, or was killed, to end.
_EXIT_TIME = 10.0


def dumps(message: Any) -> bytes:
    """Return a pickle; objects that the standard pickler refuses are pickled by cloudpickle."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        import cloudpickle

        data: bytes = cloudpickle.dumps(message)
        return data


class UnreadableMessage(TypeError):
    """A message holds an object that this process can't load."""


class _Unpickler(pickle.Unpickler):
    """Remembers the last class that it looked up, for errors that don't name it."""

    found = ""

    def find_class(self, module: str, name: str) -> Any:
        self.found = f"{module}.{name}"
        return super().find_class(module, name)


def _load_message(data: memoryview) -> Any:
    try:
        return pickle.loads(data)
    except Exception:  # noqa: BLE001 - a user's __setstate__ may raise anything
        unpickler = _Unpickler(io.BytesIO(data))
        try:
            return unpickler.load()
        except Exception as error:  # noqa: BLE001 - as above
            return UnreadableMessage(f"{unpickler.found} ({type(error).__name__}: {error})")


class Channel:
    """Sends and receives whole messages.

    A signal handler may raise inside :meth:`receive`. Bytes are kept in a buffer, so that the next
    call continues there. All methods that receive raise EOFError if the other side is gone or
    begins with another ``key``; those that send raise OSError.
    """

    def __init__(self, sock: socket.socket, key: bytes = b"") -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._awaited_key = key
        # Whether the last message was sent incompletely, so that later ones can't be read.
        self.is_cut_off = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, message: Any) -> None:
        data = dumps(message)
        header = _HEADER.pack(len(data))
        self.is_cut_off = True
        if len(data) < _CHUNK:
            self._sock.sendall(header + data)
        else:
            self._sock.sendall(header)
            self._sock.sendall(data)
        self.is_cut_off = False

    def send_raw(self, data: memoryview) -> None:
        self._sock.sendall(data)

    def send_descriptors(self, handles: Sequence[int]) -> None:
        """Send open files, before any message."""
        socket.send_fds(self._sock, [b"F"], handles)

    def receive(self) -> Any:
        while not self.pending():
            self._read()
        return pickle.loads(self._take())

    def arrived(self) -> Iterator[Any]:
        """Yield the whole messages that have arrived, once the socket is readable.

        A message that can't be loaded becomes an :class:`UnreadableMessage`. Never waits for the
        rest of a message: its sender may be stopped, or dead with the connection open elsewhere.
        """
        if not self.pending():  # left by an interrupt
            self._read()
        while self.pending():
            yield _load_message(self._take())

    def receive_raw(self, into: memoryview) -> None:
        """Fill a buffer with raw bytes."""
        size = min(len(self._buffer), len(into))
        into[:size] = memoryview(self._buffer)[:size]
        del self._buffer[:size]
        while size < len(into):
            count = self._sock.recv_into(into[size:])
            if not count:
                raise EOFError("The other process closed the connection.")
            size += count

    def receive_descriptors(self) -> list[int]:
        """Wait for descriptors and return them; fewer if too many files are open here."""
        data, handles, _, _ = socket.recv_fds(self._sock, 1, _MAX_DESCRIPTORS)
        if not data:
            raise EOFError("The other process closed the connection.")
        return handles

    def pending(self) -> bool:
        """Return whether a whole message is in the buffer, which polling does not show."""
        size = self._size()
        return size is not None and len(self._buffer) >= size

    def drain(self) -> Iterator[Any]:
        """Yield all whole messages that have arrived, as :meth:`arrived`, until none is left."""
        self._sock.setblocking(False)
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._read()
        self._sock.setblocking(True)
        while self.pending():
            yield _load_message(self._take())

    def _size(self) -> int | None:
        """Return the bytes of the next message with its header, None when too few are here."""
        if self._awaited_key or len(self._buffer) < _HEADER.size:
            return None
        size: int = _HEADER.unpack_from(self._buffer)[0]
        return _HEADER.size + size

    def _take(self) -> memoryview:
        # Mostly the only message; a large objective is not copied a second time.
        size = self._size()
        if len(self._buffer) == size:
            whole, self._buffer = self._buffer, bytearray()
        else:
            whole = self._buffer[:size]
            del self._buffer[:size]
        return memoryview(whole)[_HEADER.size :]

    def _read(self) -> None:
        size = self._size() or 0
        chunk = self._sock.recv(max(_CHUNK, min(size - len(self._buffer), 1 << 24)))
        if not chunk:
            raise EOFError("The other process closed the connection.")
        self._buffer += chunk
        key = self._awaited_key
        if key and len(self._buffer) >= len(key):
            if not hmac.compare_digest(self._buffer[: len(key)], key):
                raise EOFError("The other process does not know the key.")
            del self._buffer[: len(key)]
            self._awaited_key = b""


def channel_pair() -> tuple[Channel, Channel]:
    left, right = socket.socketpair()
    return Channel(left), Channel(right)


@dataclass
class TrialConnections:
    """The connections of the study's process to a trial and its supervisor.

    ``supervisor`` is the supervisor's pid if it is a child of this process.
    """

    channel: Channel
    control: Channel
    supervisor: int | None = None

    def disconnect(self) -> None:
        self.channel.close()
        self.control.close()

    def close(self) -> None:
        """Close the connections, which kills remaining processes; wait for the supervisor."""
        self.disconnect()
        pid, self.supervisor = self.supervisor, None
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).wait(_EXIT_TIME)


# Exceptions.

_PACKAGE = __name__.rpartition(".")[0]
_LOADED = {"builtins", "optuna", "optuna_quota"}

# First line, last line, first column and last column; columns are -1 where they are unknown.
Position = tuple[int, int, int, int]
# File, qualified name of the function, its module, and the position in the file.
Frame = tuple[str, str, str, Position]


@dataclass(frozen=True)
class SentError:
    """An exception in a form that can be sent."""

    # The exception's pickle, which loads at least in its own process; empty without one
    data: bytes
    # The nearest class that every process can load, if the pickle can't be loaded
    base: type[BaseException]
    text: str  # The exception as text, for the same case
    frames: tuple[Frame, ...]  # Its traceback, outermost first
    cause: SentError | None = None
    context: SentError | None = None
    suppress_context: bool = False


def pack_error(error: BaseException, _seen: frozenset[int] = frozenset()) -> SentError:
    seen = _seen | {id(error)}
    cause, context = (
        None if e is None or id(e) in seen else pack_error(e, seen)
        for e in (error.__cause__, error.__context__)
    )
    return SentError(
        _dump(error),
        next(c for c in type(error).__mro__ if c.__module__.partition(".")[0] in _LOADED),
        _describe(error),
        tuple(_frames(error.__traceback__)),
        cause,
        None if error.__context__ is error.__cause__ else context,
        error.__suppress_context__,
    )


def unpack_error(sent: SentError) -> BaseException:
    error = _load(sent)
    error.__cause__ = None if sent.cause is None else unpack_error(sent.cause)
    error.__context__ = None if sent.context is None else unpack_error(sent.context)
    error.__suppress_context__ = sent.suppress_context
    traceback: TracebackType | None = None
    for frame in reversed(sent.frames):
        stub, instruction = _stub_frame(frame)
        line, *_ = frame[-1]
        traceback = TracebackType(traceback, stub, instruction, line)
    return error.with_traceback(traceback)


def _load(sent: SentError) -> BaseException:
    with contextlib.suppress(Exception):  # its module may be found only where it was raised
        error: BaseException = pickle.loads(sent.data)
        return error
    with contextlib.suppress(TypeError):  # a group can't be made without its members
        return _rebuild(sent.base, (sent.text,), {})
    return RuntimeError(sent.text)


def _dump(error: BaseException) -> bytes:
    for form in (error, _WithoutCall(error)):
        try:
            data = dumps(form)
            if isinstance(pickle.loads(data), BaseException):
                return data
        except Exception:  # noqa: BLE001 - a user's __reduce__ or __init__ may raise anything
            continue
    return b""


class _WithoutCall:
    """Pickles an exception whose `__init__` can't be called with its ``args``.

    Exceptions among its arguments are treated likewise, other arguments that can't be pickled are
    replaced by their `repr`; attributes are left out.
    """

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        args = tuple(map(_argument, self._error.args))
        state = {k: v for k, v in vars(self._error).items() if _can_pickle(v)}
        return _rebuild, (type(self._error), args, state)


def _argument(value: Any) -> Any:
    if _can_pickle(value):
        return value
    if isinstance(value, BaseException):
        return _WithoutCall(value)
    if isinstance(value, (list, tuple)):  # the members of a group
        return [_argument(item) for item in value]
    return repr(value)


def _rebuild(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything
        return type(error).__name__


def _can_pickle(value: Any) -> bool:
    try:
        pickle.loads(dumps(value))
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return False
    return True


def _frames(traceback: TracebackType | None) -> list[Frame]:
    frames: list[Frame] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        # The frames above the objective belong to this package and are left out.
        if frames or not module.startswith(_PACKAGE):
            name = getattr(code, "co_qualname", code.co_name)
            frames.append((code.co_filename, name, module, _position(traceback)))
        traceback = traceback.tb_next
    return frames


def _position(traceback: TracebackType) -> Position:
    # Generated code may have no lines.
    line, index = traceback.tb_lineno or 1, traceback.tb_lasti // 2
    if sys.version_info >= (3, 11) and index >= 0:
        positions = traceback.tb_frame.f_code.co_positions()
        first, last, start, end = next(itertools.islice(positions, index, None))
        if first == line and last is not None and start is not None and end is not None:
            return first, last, start, end
    return line, line, -1, -1


def _stub_frame(frame: Frame) -> tuple[FrameType, int]:
    """Return a frame at the given position, and its instruction.

    Frames can only be created by running code, so a statement is run that raises at that position.
    """
    file, function, module, position = frame
    tree = ast.parse("raise LookupError")
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            node.lineno, node.end_lineno, node.col_offset, node.end_col_offset = position
    code = compile(tree, file, "exec").replace(co_name=function.rpartition(".")[2])
    if sys.version_info >= (3, 11):
        code = code.replace(co_qualname=function)
    try:
        exec(code, {"__name__": module, "__file__": file})
    except LookupError as error:
        traceback = error.__traceback__
        assert traceback is not None and traceback.tb_next is not None
        return traceback.tb_next.tb_frame, traceback.tb_next.tb_lasti
    raise AssertionError("The stub did not raise.")
