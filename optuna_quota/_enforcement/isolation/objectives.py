"""The objective on its way: pickled by value, but for what must stay in the study's process."""

from __future__ import annotations

import io
from typing import Any

import cloudpickle
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial

from optuna_quota._enforcement.isolation.calls import Handle
from optuna_quota._enforcement.isolation.child import proxy_of


class Residents:
    """The objects of one trial that stay in the study's process and are called from the child.

    Args:
        trial: The trial, which is the first of them.
    """

    def __init__(self, trial: Any) -> None:
        self._objects: list[Any] = [trial]

    def handle(self, found: Any) -> Handle:
        """Return the handle of an object, which stays."""
        for index, known in enumerate(self._objects):
            if known is found:
                return Handle(index, type(found))
        self._objects.append(found)
        return Handle(len(self._objects) - 1, type(found))

    def __getitem__(self, index: int) -> Any:
        return self._objects[index]


def stays(value: Any) -> bool:
    """Return whether an object belongs to the study's process: a copy of it would be another."""
    return isinstance(value, (Study, BaseStorage, Trial))


def dump_objective(objective: Any, residents: Residents) -> bytes:
    """Return the pickle of an objective.

    Functions and classes of ``__main__`` and closures go by value, those of modules by name. A
    study that the objective refers to stays here, and the child gets a proxy.

    Raises:
        TypeError: If it refers to what can't be pickled.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, residents).dump(objective)
    except Exception as error:
        raise TypeError(
            "The objective can't be sent to a process of its own because it, or something that it "
            f"refers to, can't be pickled: {error} Make that inside the objective, or use "
            "isolated(objective, start_method='fork')."
        ) from error
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    def __init__(self, file: io.BytesIO, residents: Residents) -> None:
        super().__init__(file)
        self._residents = residents

    def reducer_override(self, value: Any) -> Any:
        if stays(value):
            return (proxy_of, (self._residents.handle(value),))
        return super().reducer_override(value)
