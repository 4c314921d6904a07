from __future__ import annotations

from collections.abc import Iterator

import optuna
import pytest


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Disable Optuna's log while a module runs thousands of trials that fail on purpose."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(verbosity)
