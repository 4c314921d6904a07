"""Messages between the processes of an isolated trial: pickles over a stream socket."""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import pickle
import socket
import struct
from typing import Any


_HEADER = struct.Struct("!Q")
_CHUNK = 1 << 16
# What one message of a socket can carry, see unix(7).
_MAX_DESCRIPTORS = 253


def dumps(message: Any) -> bytes:
    """Return a pickle, with what the standard pickler refuses by value."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        import cloudpickle

        data: bytes = cloudpickle.dumps(message)
        return data


class Channel:
    """Sends and receives whole messages.

    A signal handler may raise out of :meth:`receive` at any time. Bytes are kept in a buffer, so
    that the next call continues where this one was cut off.

    All methods that receive raise EOFError when the other side is gone, those that send OSError.

    Args:
        sock: A connected stream socket, blocking; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()

    def send(self, message: Any) -> None:
        """Send one message."""
        data = dumps(message)
        header = _HEADER.pack(len(data))
        if len(data) < _CHUNK:
            self._sock.sendall(header + data)
        else:
            self._sock.sendall(header)
            self._sock.sendall(data)

    def send_raw(self, data: memoryview) -> None:
        """Send the bytes of a buffer as they are; the other side must know how many."""
        self._sock.sendall(data)

    def send_descriptors(self, handles: Sequence[int]) -> None:
        """Send open files, before any message."""
        socket.send_fds(self._sock, [b"F"], handles)

    def receive(self) -> Any:
        """Return the next message, waiting for it."""
        while True:
            message = self._take()
            if message is not None:
                return pickle.loads(message)
            self._read()

    def receive_raw(self, into: memoryview) -> None:
        """Fill a buffer with bytes that were sent as they are."""
        size = min(len(self._buffer), len(into))
        into[:size] = memoryview(self._buffer)[:size]
        del self._buffer[:size]
        while size < len(into):
            count = self._sock.recv_into(into[size:])
            if not count:
                raise EOFError("The other process closed the connection.")
            size += count

    def receive_descriptors(self) -> list[int]:
        """Return the files that were sent, waiting for them."""
        data, handles, _, _ = socket.recv_fds(self._sock, 1, _MAX_DESCRIPTORS)
        if not data:
            raise EOFError("The other process closed the connection.")
        return handles

    def pending(self) -> bool:
        """Return whether a whole message is in the buffer, which polling does not show."""
        size = self._size()
        return size is not None and len(self._buffer) >= size

    def drain(self) -> list[Any]:
        """Return the whole messages that have arrived, without waiting."""
        messages = []
        self._sock.setblocking(False)
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._read()
        self._sock.setblocking(True)
        while (message := self._take()) is not None:
            messages.append(pickle.loads(message))
        return messages

    def _size(self) -> int | None:
        if len(self._buffer) < _HEADER.size:
            return None
        size: int = _HEADER.unpack_from(self._buffer)[0]
        return _HEADER.size + size

    def _take(self) -> bytes | bytearray | None:
        size = self._size()
        if size is None or len(self._buffer) < size:
            return None
        if len(self._buffer) == size:
            # The usual case, and that of a large objective, of which there is no second copy.
            whole, self._buffer = self._buffer, bytearray()
            del whole[: _HEADER.size]
            return whole
        message = bytes(memoryview(self._buffer)[_HEADER.size : size])
        del self._buffer[:size]
        return message

    def _read(self) -> None:
        size = self._size() or 0
        chunk = self._sock.recv(max(_CHUNK, min(size - len(self._buffer), 1 << 24)))
        if not chunk:
            raise EOFError("The other process closed the connection.")
        self._buffer += chunk


def channel_pair() -> tuple[Channel, Channel]:
    """Return the two ends of a new connection."""
    left, right = socket.socketpair()
    return Channel(left), Channel(right)
