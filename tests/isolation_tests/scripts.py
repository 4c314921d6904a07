"""Run scripts with studies in an interpreter of their own, for tests of what their trials find."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


METHODS = ("forkserver", "fork", "spawn")

# The scripts of `run_script` import all of this.
HELPERS = """\
import json, os, sys, time
import optuna
from optuna_quota import isolated, Limits
optuna.logging.set_verbosity(optuna.logging.ERROR)
METHODS = ("forkserver", "fork", "spawn")

def values(objective, n_trials=2, methods=METHODS, **options):
    found = {}
    for method in methods:
        study = optuna.create_study()
        study.optimize(isolated(objective, start_method=method, **options), n_trials=n_trials)
        found[method] = [t.value for t in study.trials]
    return found

def say(**found):
    with open("found.json", "w") as file:
        json.dump(found, file)
"""


def _restore_interrupts() -> None:
    """Restore SIGINT, which a shell ignores in background processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_python(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run Python in a folder and return its output; errors are in ``errors.txt``.

    Output goes to files, as a pipe would wait for processes that are left behind.
    """
    root = str(Path(__file__).parents[2])
    output, errors = folder / "output.txt", folder / "errors.txt"
    with output.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}"},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_restore_interrupts,
        )
        try:
            assert process.wait(100) == code, errors.read_text()
        finally:
            # Processes that are left behind, such as managers, are in its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return output.read_text()


def run_script(folder: Path, source: str, *arguments: str) -> Any:
    """Run a script that uses ``HELPERS``, or other arguments of Python; return what it says."""
    (folder / "helpers.py").write_text(HELPERS)
    (folder / "script.py").write_text(f"from helpers import *\n{source}")
    run_python(folder, *(arguments or ["script.py"]))
    return json.loads((folder / "found.json").read_text())


def journal(folder: Path | str) -> JournalStorage:
    """Open the storage of a script and its test; to load what SQLite's needs takes a second."""
    return JournalStorage(JournalFileBackend(f"{folder}/study.log"))


def always(*values: float | None) -> dict[str, list[float | None]]:
    """Return the same values for each start method."""
    return {method: list(values) for method in METHODS}
