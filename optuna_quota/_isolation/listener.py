"""Further connections to the study's process, of the processes that a trial starts.

A connection serves one process: answers to several would be mixed up. A trial's own process has
one from its start. Others, forked or handed the trial in a pickle, connect to this address.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
import hmac
import secrets
import socket
import sys
from typing import Any

from optuna_quota._isolation.channel import Channel


_KEY_SIZE = 32


@dataclass(frozen=True)
class Address:
    """Where to connect.

    Attributes:
        name: An abstract name on Linux, host and port elsewhere.
        key: What a connection sends first: other users of the machine may see the name.
    """

    name: Any
    key: bytes = field(repr=False)


def connect(address: Address) -> Channel:
    """Return a new connection.

    Raises:
        OSError: If the study's process is gone.
    """
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
    """Accepts connections of one trial's processes, in the study's process.

    Attributes:
        address: Where they connect.
    """

    def __init__(self) -> None:
        key = secrets.token_bytes(_KEY_SIZE)
        if sys.platform == "linux":
            name: Any = f"\0optuna-quota-{secrets.token_hex(16)}"
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(name)
            self._sock.listen()
        else:
            self._sock = socket.create_server(("127.0.0.1", 0))
            name = self._sock.getsockname()
        self._sock.setblocking(False)
        self.address = Address(name, key)

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._sock.fileno()

    def close(self) -> None:
        """Accept no more connections; idempotent."""
        self._sock.close()

    def accept(self) -> socket.socket | None:
        """Return a connection that is yet to be admitted, None if it is gone already."""
        with contextlib.suppress(OSError):
            return self._sock.accept()[0]
        return None

    def admit(self, sock: socket.socket) -> Channel | None:
        """Return the connection if it sent the key, which has arrived; else close it."""
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sent = sock.recv(_KEY_SIZE)
            sock.setblocking(True)
            if hmac.compare_digest(sent, self.address.key):
                return Channel(sock)
        sock.close()
        return None
