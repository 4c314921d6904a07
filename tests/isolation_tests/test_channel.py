"""Messages over sockets."""

from __future__ import annotations

import pickle
import socket
import sys
import traceback
from typing import Any

import pytest

from optuna_quota._isolation.channel import (
    Channel,
    channel_pair,
    pack_error,
    unpack_error,
    UnreadableMessage,
)
from tests.isolation_tests.trials import caught, raises


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
    assert list(right.drain()) == ["last"]
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
    assert list(channel.drain()) == []
    theirs.sendall(data[3:])
    assert channel.receive() == "whole"
    channel.close()
    whole.close()


class OutOfMemory:
    def __reduce__(self) -> Any:
        return bytearray, (2**62,)


def test_an_unreadable_message_is_an_error_in_a_trial_and_an_object_in_the_study() -> None:
    left, right = channel_pair()
    for _ in range(2):
        left.send(OutOfMemory())
        left.send("next")
    # The trial's process learns from it that its memory limit was reached.
    with pytest.raises(MemoryError):
        right.receive()
    assert right.receive() == "next"
    left.close()
    first, second = right.drain()
    assert isinstance(first, UnreadableMessage) and "bytearray (MemoryError" in str(first)
    assert second == "next"
    right.close()


def test_messages_that_an_interrupt_left_over_come_before_the_end() -> None:
    left, right = channel_pair()
    left.send("first")
    left.send("second")
    for message in right.arrived():
        assert message == "first"
        break
    left.close()
    assert list(right.arrived()) == ["second"]
    with pytest.raises(EOFError):
        list(right.arrived())
    right.close()


# Exceptions of a trial in the study's process.


class NeedsTwo(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.first = first
        self.handle = socket


class Refuses(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


def test_type_state_cause_and_traceback_are_kept() -> None:
    def inner() -> None:
        raise NeedsTwo(1, 2)

    def outer() -> None:
        try:
            inner()
        except NeedsTwo as error:
            raise KeyError("outer") from error

    original = caught(outer)
    error = unpack_error(pickle.loads(pickle.dumps(pack_error(original))))
    assert isinstance(error, KeyError) and isinstance(error.__cause__, NeedsTwo)
    assert error.__cause__.first == 1 and str(error.__cause__) == "1 and 2"
    text = traceback.format_exception(error)
    # With the source lines and, from Python 3.11 on, the marks under them.
    assert text == traceback.format_exception(original)
    assert any("raise NeedsTwo(1, 2)" in part for part in text)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert [frame.f_globals["__name__"] for frame in frames] == [caught.__module__, __name__]


def test_an_exception_that_refuses_to_be_pickled_keeps_its_class() -> None:
    error = unpack_error(pack_error(caught(raises(Refuses("why")))))
    assert isinstance(error, Refuses) and error.args == ("why",)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no exception groups")
def test_a_group_of_exceptions_that_refuse_to_be_pickled_keeps_its_members() -> None:
    group: Any = ExceptionGroup("two", [Refuses("a"), Refuses("b")])  # type: ignore[name-defined, unused-ignore]  # noqa: F821
    error: Any = unpack_error(pack_error(group))
    assert type(error) is type(group) and error.message == "two"
    assert [(type(e), e.args) for e in error.exceptions] == [(Refuses, ("a",)), (Refuses, ("b",))]
