"""The one place that loads plotly, which is optional."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_plotly(module: str = "plotly.graph_objects") -> ModuleType:
    """Return a module of plotly.

    Raises:
        ImportError: If plotly is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "Pictures need plotly, which is not installed: pip install 'optuna-quota[plot]'."
        ) from error
