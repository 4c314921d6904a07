"""The study's side of a running trial."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import itertools
import signal
import socket
import subprocess
import threading
import time
from unittest.mock import Mock

import optuna
import pytest

from optuna_quota._isolation import server as server_module
from optuna_quota._isolation.channel import Channel, channel_pair, TrialConnections
from optuna_quota._isolation.messages import BreachFound, ExitReport, ProcessStarted
from optuna_quota._isolation.output import Printed
from optuna_quota._isolation.rpc import CHECK, connect, RemoteObjects
from optuna_quota._isolation.server import NotStarted, Server
from optuna_quota._isolation.signals import Interrupts
from optuna_quota._usage import Breach
from tests.isolation_tests.trials import needs_supervisor


@pytest.fixture
def remote() -> Iterator[RemoteObjects]:
    with contextlib.closing(RemoteObjects(optuna.create_study().ask())) as found:
        yield found


def serve(remote: RemoteObjects, events: Mock, supervisor: Channel, control: Channel) -> None:
    trial, channel = channel_pair()
    server = Server(TrialConnections(channel, control), remote, events, label="Trial 0")
    try:
        server.serve()
    finally:
        server.close()
        for each in (trial, channel, supervisor, control):
            each.close()


def test_messages_just_before_the_end_of_a_process_are_read(
    remote: RemoteObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor, control = channel_pair()
    for text in ("one", "two"):
        rank = connect(remote.listener.address)
        rank.send(Printed("stdout", text))
        rank.close()
    supervisor.send(ExitReport(exitcode=0))
    serve(remote, Mock(), supervisor, control)
    assert capsys.readouterr().out == "onetwo"


def test_half_a_message_does_not_keep_the_others_waiting(remote: RemoteObjects) -> None:
    # Its sender was stopped by a signal, or killed while a process of its holds the connection.
    supervisor, control = channel_pair()
    ours, theirs = socket.socketpair()
    theirs.sendall(b"\0" * 7)
    supervisor.send(ExitReport(exitcode=0))
    server = Server(TrialConnections(Channel(ours), control), remote, Mock(), label="Trial 0")
    threading.Timer(2.0, theirs.close).start()
    begun = time.monotonic()
    server.serve()
    assert time.monotonic() - begun < 1
    server.close()
    for each in (ours, theirs, supervisor, control):
        each.close()


def test_memory_over_its_limit_at_the_start_is_not_taken_for_an_earlier_breach(
    remote: RemoteObjects,
) -> None:
    supervisor, control = channel_pair()
    trial, channel = channel_pair()
    server = Server(TrialConnections(channel, control), remote, Mock(), label="Trial 0")
    late = Breach("wall_time", 1.0, 2.0, 2.0)
    server.stop(late, 0.0)
    supervisor.send(BreachFound(Breach("memory", 5.0, 6.0, 2.0), before_objective=True))
    supervisor.send(ExitReport(exitcode=0))
    server.serve()
    assert (server.breach, server.never_fits) == (late, False)
    server.close()
    for each in (trial, channel, supervisor, control):
        each.close()


@pytest.fixture
def silent(remote: RemoteObjects, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yield the server of a trial whose supervisor never reports, as it hangs in the kernel."""
    monkeypatch.setattr(server_module, "REPORT_TIME", 0.3)
    channels = [channel_pair() for _ in range(2)]
    (_, trial), (supervisor, control) = channels
    with subprocess.Popen(["sleep", "600"]) as process:
        supervisor.send(ProcessStarted(process.pid))
        server = Server(TrialConnections(trial, control), remote, Mock(), label="Trial 0")
        yield server
        # It was killed, and the trial along with it, by PR_SET_PDEATHSIG.
        assert process.wait(60) == -signal.SIGKILL
    server.close()
    for pair in channels:
        for each in pair:
            each.close()


@needs_supervisor
def test_a_trial_is_given_up_whose_supervisor_hangs_after_a_breach(silent: Server) -> None:
    silent.stop(Breach("wall_time", 1.0, 2.0, 2.0), grace_period=0.2)
    silent.serve()
    assert silent.exit is not None and "did not report its end" in silent.exit.stuck


@needs_supervisor
def test_to_kill_a_trial_ends_though_its_supervisor_hangs(silent: Server) -> None:
    silent.kill()
    assert silent.exit is not None and "did not report its end" in silent.exit.stuck


@needs_supervisor
def test_a_supervisor_that_is_gone_is_noticed_though_its_connection_is_open(
    remote: RemoteObjects,
) -> None:
    supervisor, control = channel_pair()
    with subprocess.Popen(["true"]) as process:
        supervisor.send(ProcessStarted(process.pid))
        serve(remote, Mock(), supervisor, control)


def test_a_slow_storage_is_asked_seldom(
    remote: RemoteObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_ROW_INTERVAL", 0.0)
    supervisor, control = channel_pair()
    calls: list[tuple[float, float]] = []

    def check_row() -> None:
        begun = time.monotonic()
        time.sleep(0.01)
        calls.append((begun, time.monotonic()))
        if len(calls) == 3:
            supervisor.send(ExitReport(exitcode=0))

    serve(remote, Mock(check_row=check_row), supervisor, control)
    for (begun, ended), (again, _) in itertools.pairwise(calls):
        assert again - ended > 10 * (ended - begun)


class Deaf:
    """Is interrupted where Python prints the exception and continues."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["finalizer", "between receiving and answering", "at the end"])
def test_an_interrupt_is_neither_lost_nor_cuts_a_message_off(
    remote: RemoteObjects, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    supervisor, control = channel_pair()
    rank = connect(remote.listener.address)
    called: list[str] = []

    def check() -> None:
        called.append(CHECK)
        if place == "finalizer":
            Deaf()

    def receive(channel: Channel) -> object:
        message = original(channel)
        if place != "finalizer":
            signal.raise_signal(signal.SIGINT)
        return message

    original = Channel._take
    monkeypatch.setattr(Channel, "_take", receive)
    if place == "at the end":
        supervisor.send(ExitReport(exitcode=0))
    else:
        for number in range(2):
            rank.send((number, 0, CHECK, (), {}))
    with pytest.raises(KeyboardInterrupt):
        serve(remote, Mock(find_breach=check), supervisor, control)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    if place == "at the end":
        return
    errors = [rank.receive()[2] is not None for _ in range(1 + len(called))]
    # What waits for an answer gets one: the interrupt where it was not answered before.
    assert errors == ([False, True] if place == "finalizer" else [True])
    rank.close()


def test_an_interrupt_survives_an_error_and_a_second_one_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)
        raise NotStarted("on purpose")
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]
