"""Which GPUs the trials of other processes on this machine may use.

A device's memory is one trial's only while no other trial has the device, of another worker too.
The names of abstract sockets are seen by all processes of a machine or container, and are gone
with theirs: no file is left behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
import secrets
import socket
import sys


_NAMES = Path("/proc/net/unix")
_PREFIX = "optuna-quota/gpu/"


class GpuPresence:
    """Tells other processes which GPUs the trials of this one may use; not for several threads."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self._sockets: dict[str, socket.socket] = {}

    def show(self, devices: Iterable[str]) -> None:
        """Show that trials of this process may use these devices and no others."""
        wanted = set(devices) if sys.platform.startswith("linux") else set()
        for device in self._sockets.keys() - wanted:
            self._sockets.pop(device).close()
        for device in wanted - self._sockets.keys():
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sockets[device] = name
            name.bind(f"\0{_PREFIX}{device}/{self._token}")

    def others(self) -> set[str]:
        """Return the devices that trials of other processes may use."""
        if not sys.platform.startswith("linux"):
            return set()
        found = set()
        for line in _NAMES.read_text(errors="replace").splitlines():
            _, is_ours, name = line.partition(f" @{_PREFIX}")
            device, _, token = name.rpartition("/")
            if is_ours and token != self._token:
                found.add(device)
        return found
