"""Acts on a module once it is imported, which may be never."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


def after_import(name: str, act: Callable[[types.ModuleType], None]) -> None:
    """Call back with a module once it is imported; at once if it is already."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the others would, and acts after it has run."""

    def __init__(self, name: str, act: Callable[[types.ModuleType], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the others' spec with a loader that acts afterwards."""
        if fullname != self._name:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._act(module)

        loader.exec_module = exec_module
