"""Messages over sockets."""

from __future__ import annotations

import pickle
import socket
from typing import Any

import pytest

from optuna_quota._isolation.channel import Channel, channel_pair


def test_a_channel_keeps_in_step_with_messages_of_any_size() -> None:
    import threading

    left, right = channel_pair()
    messages: list[Any] = [1, "two", b"3" * 5_000_000, {"four": [None]}]
    sender = threading.Thread(target=lambda: [left.send(m) for m in messages])
    sender.start()
    assert [right.receive() for _ in messages] == messages
    sender.join()
    left.send("last")
    left.close()
    assert right.drain() == ["last"]
    with pytest.raises(EOFError):
        right.receive()
    right.close()


def test_a_message_that_was_cut_off_is_completed() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    whole = Channel(theirs)
    data = pickle.dumps("whole")
    theirs.sendall(len(data).to_bytes(8, "big") + data[:3])
    assert not channel.pending()
    assert channel.drain() == []
    theirs.sendall(data[3:])
    assert channel.receive() == "whole"
    channel.close()
    whole.close()
