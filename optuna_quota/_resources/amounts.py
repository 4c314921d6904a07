"""Amounts by resource: the common part of limits and quotas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optuna_quota._resources.resource import RESOURCES


class Amounts:
    """Amounts by resource: the common part of limits and quotas."""

    _fields: tuple[str, ...] = ()

    def _set(self, name: str, value: Any) -> None:
        parsed = None if value is None else RESOURCES[name].parse(value, name)
        object.__setattr__(self, name, parsed)

    def amounts(self) -> dict[str, float]:
        """Return what is set, by resource, in SI base units."""
        values = ((name, getattr(self, name)) for name in self._fields)
        return {name: value for name, value in values if value is not None}

    def __bool__(self) -> bool:
        return bool(self.amounts())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> Iterator[str]:
        for name in self._fields:
            value = getattr(self, name)
            if value is not None:
                yield f"{name}={RESOURCES[name].compact(value)!r}"
