"""A fake loop and what it warns of; a fake NVIDIA driver, and scripts that run beside it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
import logging
import os
from pathlib import Path
import shutil
import subprocess
import sys
import textwrap

import pytest

from optuna_quota._metering.warn import forget_warnings
from optuna_quota.testing import fake_metering
from optuna_quota.testing import FakeMetering


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


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


@dataclass
class FakeNvml:
    """A driver whose state a script may change while it runs, by ``say(text)``."""

    library: Path
    state: Path

    def run(self, code: str, state: str = "", **environment: str) -> str:
        self.state.write_text(textwrap.dedent(state))
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("CUDA_")},
            "LD_LIBRARY_PATH": str(self.library),
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
from optuna_quota._metering import MeteringLoop

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
            out = str(folder / "libnvidia-ml.so.1")
            source = str(HERE / "fake_nvml.c")
            subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", out, source], check=True)
            built[flags] = folder
        return built[flags]

    return build


@pytest.fixture
def nvml(build_nvml: Callable[..., Path], tmp_path: Path) -> Callable[..., FakeNvml]:
    def make(*flags: str) -> FakeNvml:
        return FakeNvml(build_nvml(*flags), tmp_path / "state")

    return make
