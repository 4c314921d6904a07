"""Optuna's own pruner tests, from its source distribution, on wrapped pruners."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import re
import subprocess
import sys
import tarfile

import optuna
import pytest


# Runs in the temporary folder, before Optuna's tests are imported: what they take for a pruner is
# then a QuotaPruner around it. Optuna's own inner pruners (those that Hyperband makes) stay bare.
CONFTEST = """
from abc import ABCMeta

import optuna

from optuna_quota import Limits
from optuna_quota import QuotaPruner

ROOM = Limits(memory="1TiB", wall_time="10h")
wrapped = set()


class Meta(ABCMeta):
    def __instancecheck__(cls, instance):
        # Optuna looks the class up by the name that is replaced here.
        return isinstance(instance, cls.__mro__[1])


def wrapping(pruner_class):
    class Wrapping(pruner_class, metaclass=Meta):
        def __new__(cls, *args, **kwargs):
            # What is patched on the class by its name must reach the base pruner.
            base = super().__new__(cls)
            base.__init__(*args, **kwargs)
            wrapped.add(pruner_class.__name__)
            return QuotaPruner(base, limits=ROOM)

    Wrapping.__name__ = pruner_class.__name__
    return Wrapping


for name in optuna.pruners.__all__:
    if name != "BasePruner":
        setattr(optuna.pruners, name, wrapping(getattr(optuna.pruners, name)))


def pytest_sessionfinish(session, exitstatus):
    print("\\nwrapped pruners:", len(wrapped))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("optuna")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:"]
    command += ["--no-deps", "--dest", str(folder), f"optuna=={optuna.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"Optuna's source distribution can't be had: {reason}")
    (archive,) = folder.glob("optuna-*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    # Only its tests: the installed Optuna is what they try.
    tests = folder / "upstream" / "tests"
    tests.parent.mkdir()
    (unpacked / "tests").rename(tests)
    yield tests


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_optunas_own_pruner_tests_pass_on_wrapped_pruners(sources: Path) -> None:
    (sources / "pruners_tests" / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-s"]
    command += ["--rootdir", str(sources.parent), str(sources / "pruners_tests")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        cwd=sources.parent,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{sources.parent}"},
    )
    report = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", done.stdout)
    kinds = re.search(r"wrapped pruners: (\d+)", done.stdout)
    assert passed and int(passed[1]) >= 90, report
    # Median, Nop, Patient, Percentile, SuccessiveHalving, Threshold, Wilcoxon, Hyperband.
    assert kinds and int(kinds[1]) >= 7, report
