"""Python scripts that run beside a test: start one, read its lines, tell it to go on."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import subprocess
import sys


ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, signal, sys, time
MIB = 2**20

def fork(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
            time.sleep(120)
        finally:
            os._exit(0)
    return pid

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, beside the others'

def hear():
    return sys.stdin.readline()
"""


@contextlib.contextmanager
def script(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python in a session of its own, which is ended as a whole."""
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with child:
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)


def line(child: subprocess.Popen[str]) -> str:
    """Return the next line that a script prints."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str], words: str = "") -> None:
    """Let a script that waits for its input continue."""
    assert child.stdin is not None
    child.stdin.write(f"{words}\n")
    child.stdin.flush()
