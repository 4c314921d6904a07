"""Settings of the whole test suite."""

from __future__ import annotations

from collections.abc import Iterator
import signal

from hypothesis import HealthCheck, settings
import pytest

from optuna_quota._isolation import forkserver_client
from tests.storages import without_fsync


# Test machines are shared and slow at times: a slow draw is no failure.
settings.register_profile(
    "optuna_quota", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("optuna_quota")

# A shell starts background jobs with SIGINT ignored, which the scripts of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _fast_writes() -> Iterator[None]:
    with without_fsync():
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_fork_server() -> Iterator[None]:
    """Let isolated trials begin with little loaded, whatever this test run has imported.

    What a trial's memory and start are measured by would else depend on the tests that ran before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver_client, "modules_to_preload", lambda *, everything: [])
        yield
