"""Connections of the processes that a trial starts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
import select

import pytest

from optuna_quota._isolation.channel import Channel
from optuna_quota._isolation.listener import connect, Listener


def admit(listener: Listener) -> Channel | None:
    new = listener.accept()
    assert new is not None
    select.select([new], [], [], 60)
    return listener.admit(new)


def test_a_connection_needs_the_key() -> None:
    with contextlib.closing(Listener()) as listener:
        assert listener.accept() is None
        with contextlib.closing(connect(listener.address)) as theirs:
            ours = admit(listener)
            assert ours is not None
            ours.send("hello")
            assert theirs.receive() == "hello"
            ours.close()
        for key in (b"", b"x", b"x" * 32, listener.address.key[:-1]):
            with contextlib.closing(connect(replace(listener.address, key=key))) as stranger:
                if not key:
                    stranger.close()
                assert admit(listener) is None
                if key:
                    with pytest.raises((EOFError, ConnectionError)):
                        stranger.receive()


def test_the_key_is_not_shown() -> None:
    with contextlib.closing(Listener()) as listener:
        assert "key" not in repr(listener.address)


def test_after_the_trial_there_is_no_connection() -> None:
    listener = Listener()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        connect(listener.address)
