"""A fake loop and its warnings; a fake NVIDIA driver, and scripts that run on it."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import functools
import json
import logging
import os
from pathlib import Path
import shutil
import subprocess
import sys
import textwrap

import pytest

from optuna_quota._metering.meter import forget_warnings
from optuna_quota.testing import fake_metering, FakeMetering


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARY = "libnvidia-ml.so.1"


@pytest.fixture
def fake() -> Iterator[FakeMetering]:
    forget_warnings()
    with fake_metering() as metering:
        yield metering
    forget_warnings()


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    handler = Records()
    logger = logging.getLogger("optuna.quota.metering")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


class ForkServer:
    """Runs scripts in forks of a process that has imported the package: 1 s less for each."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            env={**env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)

    def run(self, script: str, library: str, environment: dict[str, str]) -> tuple[int, str, str]:
        """Return the exit code, and what it wrote to its standard output and error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([script, library, environment]) + "\n")
        self._process.stdin.flush()
        code, out, err = json.loads(self._process.stdout.readline())
        return code, out, err


FORK_SERVER = """
import ctypes, json, os, sys, tempfile, threading, traceback
import psutil, optuna_quota._metering, optuna_quota._ledger

def run(script, library, environment, out, err):
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.stdin.close()
    os.environ.update(environment)
    if library:
        ctypes.CDLL(library)  # found by its name from now on
    try:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (pid := os.fork()) == 0:
            threading.Timer(60, os._exit, [99]).start()
            code = run(*json.loads(line), out, err)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read(), err.read()]), flush=True)
"""


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


@dataclass
class FakeNvml:
    """A driver whose state a script may change while it runs, by ``say(text)``."""

    library: Path
    state: Path

    def run(
        self, code: str, state: str = "", *, has_driver: bool = True, **environment: str
    ) -> str:
        """Return what a script writes, run in a fork of a warm process."""
        self.state.write_text(textwrap.dedent(state))
        script = PRELUDE + textwrap.dedent(code)
        library = str(self.library / LIBRARY) if has_driver else ""
        environment["FAKE_NVML"] = str(self.state)
        # For what the script starts; of its own process the loader has read it already.
        environment["LD_LIBRARY_PATH"] = str(self.library) if has_driver else ""
        code_, out, err = fork_server().run(script, library, environment)
        assert code_ == 0, err
        return out

    def run_apart(self, code: str, *, has_driver: bool = True, **environment: str) -> str:
        """Return what a script writes, run by an interpreter of its own."""
        self.state.write_text("")
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("CUDA_")},
            "LD_LIBRARY_PATH": str(self.library) if has_driver else "",
            "FAKE_NVML": str(self.state),
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        script = PRELUDE + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


PRELUDE = """
import logging, os, sys, textwrap, time
from optuna_quota import Limits
from optuna_quota._metering import gpu_reader, MeteringLoop

# Tests at the same time have devices of the same names, and are no workers of one machine.
gpu_reader._PREFIX += f"{os.getpid()}/"
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
logging.getLogger("optuna.quota").addHandler(handler)
me = os.getpid()

def say(text):
    with open(os.environ["FAKE_NVML"] + ".new", "w") as file:
        file.write(textwrap.dedent(text))
    os.replace(file.name, os.environ["FAKE_NVML"])

def show(usage):
    print(usage.gpu_memory, usage.gpu_time, usage.energy)

loop = MeteringLoop(threaded=False)
"""


@pytest.fixture(scope="session")
def build_nvml(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the fake NVIDIA driver needs gcc and Linux")
    built: dict[tuple[str, ...], Path] = {}

    def build(*flags: str) -> Path:
        if flags not in built:
            folder = tmp_path_factory.mktemp("nvml")
            kind = ["-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
            source = str(HERE / "fake_nvml.c")
            subprocess.run(
                [compiler, *kind, *flags, "-o", str(folder / LIBRARY), source], check=True
            )
            (folder / "libcuda.so.1").symlink_to(folder / LIBRARY)
            built[flags] = folder
        return built[flags]

    return build


@pytest.fixture
def nvml(build_nvml: Callable[..., Path], tmp_path: Path) -> Callable[..., FakeNvml]:
    def make(*flags: str) -> FakeNvml:
        return FakeNvml(build_nvml(*flags), tmp_path / "state")

    return make
