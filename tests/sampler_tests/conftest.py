"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
import logging

import optuna
import pytest


@pytest.fixture
def quota_warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns a function that returns the warnings logged so far, and forgets them."""
    optuna.logging.enable_propagation()
    caplog.set_level(logging.WARNING, logger="optuna.quota")

    def warnings() -> list[str]:
        # With propagation, one record may come by two handlers.
        records = {id(r): r for r in caplog.records if r.name.startswith("optuna.quota")}
        caplog.clear()
        return [record.getMessage() for record in records.values()]

    return warnings


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use one thread for the GP's small matrices: two wait for each other beside other tests."""
    marker = request.node.get_closest_marker("integration")
    if marker is None or find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
