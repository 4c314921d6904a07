"""The study's side of a running trial."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import itertools
import time
from unittest.mock import Mock

import optuna
import pytest

from optuna_quota._isolation import server as server_module
from optuna_quota._isolation.channel import Channel, channel_pair
from optuna_quota._isolation.launch import TrialConnections
from optuna_quota._isolation.listener import connect
from optuna_quota._isolation.messages import ExitReport
from optuna_quota._isolation.output import Printed
from optuna_quota._isolation.rpc import RemoteObjects
from optuna_quota._isolation.server import Server


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


def test_what_a_process_sent_just_before_the_end(
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
