"""An isolated trial, and what it may leave behind, for tests of how such trials end."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import time
from typing import Any

import optuna
import pytest

from optuna_quota import isolated, Limits, QuotaPruner
from optuna_quota._isolation.linux import can_supervise


MIB = 2**20
GIB = 2**30

needs_supervisor = pytest.mark.skipif(not can_supervise(), reason="needs Linux with pidfds")


def run_one(
    objective: Callable[..., Any], limits: Limits | None = None, **options: Any
) -> optuna.trial.FrozenTrial:
    pruner = None if limits is None else QuotaPruner(limits=limits)
    study = optuna.create_study(pruner=pruner)
    study.optimize(isolated(objective, **options), n_trials=1, catch=(Exception,))
    return study.trials[0]


def escape(folder: str) -> None:
    """Start a child in a session of its own and two that have lost their parents."""
    for depth in (1, 2, 2):
        pid = os.fork()
        if pid == 0:
            if depth == 1:
                os.setsid()
            elif os.fork() > 0:
                os._exit(0)
            Path(folder, str(os.getpid())).touch()
            time.sleep(60)
            os._exit(0)
        elif depth == 2:
            os.waitpid(pid, 0)
    while len(os.listdir(folder)) < 3:
        time.sleep(0.01)


def caught(act: Any) -> BaseException:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - whatever the act raises is what is asked for
        return error
    raise AssertionError("Nothing was raised.")


def raises(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act
