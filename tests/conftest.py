"""Settings of the whole test suite."""

from __future__ import annotations

from collections.abc import Generator, Iterator
import compileall
import faulthandler
import gc
import importlib
from importlib.util import find_spec
import os
from pathlib import Path
import signal
import sys

from hypothesis import HealthCheck, settings
import pytest

from optuna_quota._isolation import forkserver_client
from tests.storages import without_fsync


ROOT = Path(__file__).parents[1]

# Test machines are shared and slow at times: a slow draw is no failure.
settings.register_profile(
    "optuna_quota", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("optuna_quota")

# A shell starts background jobs with SIGINT ignored, which the scripts of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    if sys.dont_write_bytecode and not hasattr(config, "workerinput"):
        # Tests start hundreds of interpreters, which would each compile the package again.
        compileall.compile_dir(ROOT / "optuna_quota", quiet=2)
    # While tests run, it is captured.
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the run, with the stacks of all threads, where a timeout does not end its test.

    The timeout raises an exception in the main thread, which may be about to join a worker's.
    """
    marker = item.get_closest_marker("timeout")
    usual = float(item.config.getini("timeout")) if marker is None else marker.args[0]
    given = item.config.getoption("timeout")
    seconds = usual if given is None else given
    if seconds:
        stderr = item.config.stash[_stderr]
        faulthandler.dump_traceback_later(max(seconds, usual) + 60, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Keep what is loaded by now out of collections: each study with a limit on memory does one.

    To go through all test items and libraries takes tenths of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _fast_writes() -> Iterator[None]:
    with without_fsync():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_small_matrices() -> Iterator[None]:
    """Let NumPy and SciPy start no threads in this process and its forks.

    They would wait for each other by spinning, on the cores that other tests need.
    """
    if find_spec("threadpoolctl") is None:
        yield
        return
    importlib.import_module("scipy.linalg")  # has a library of its own
    with importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_fork_server() -> Iterator[None]:
    """Let isolated trials begin with little loaded, whatever this test run has imported.

    What a trial's memory and start are measured by would else depend on the tests that ran before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver_client, "modules_to_preload", lambda *, everything: [])
        yield


@pytest.fixture(autouse=True)
def _beside_others(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Let a test marked `alone` run beside no other one where xdist runs several at a time."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import fcntl

    folder = tmp_path_factory.getbasetemp().parent
    alone = request.node.get_closest_marker("alone") is not None
    with (folder / "gate.lock").open("w") as gate, (folder / "tests.lock").open("w") as tests:
        # One at a time: a test that waits to be alone blocks later ones.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
        # A child that outlives the test may hold the file open, and with it the lock.
        fcntl.flock(tests, fcntl.LOCK_UN)
