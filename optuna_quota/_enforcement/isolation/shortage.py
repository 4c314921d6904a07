"""Recognises the many forms in which Python code says that memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
import dis
import math
import re
from types import TracebackType
from typing import Any
from typing import Literal


@dataclass(frozen=True)
class Shortage:
    """An allocation that failed.

    Attributes:
        resource: Whose memory.
        requested: The bytes asked for, None when the error does not tell.
        text: The message of the error that says so.
    """

    resource: Literal["memory", "gpu_memory"]
    requested: float | None = None
    text: str = field(default="", compare=False)


# Module and name of the class, what the message must contain, whose memory. The classes belong to
# libraries that are not imported for this.
_CLASSES = (
    ("torch", "OutOfMemoryError", "", "gpu_memory"),
    ("cupy", "OutOfMemoryError", "", "gpu_memory"),
    ("rmm", "RMMError", "out_of_memory", "gpu_memory"),
    ("tensorflow", "ResourceExhaustedError", "gpu", "gpu_memory"),
    ("tensorflow", "ResourceExhaustedError", "", "memory"),
    ("jax", "XlaRuntimeError", "resource_exhausted", "gpu_memory"),
    ("jax", "JaxRuntimeError", "resource_exhausted", "gpu_memory"),
    ("", "", "cuda out of memory", "gpu_memory"),
    ("", "", "cuda error: out of memory", "gpu_memory"),
    ("", "", "cuda_error_out_of_memory", "gpu_memory"),
    ("", "", "cudaerrormemoryallocation", "gpu_memory"),
    ("", "", "cublas_status_alloc_failed", "gpu_memory"),
    ("", "RuntimeError", "can't allocate memory", "memory"),
    ("", "RuntimeError", "not enough memory", "memory"),
    ("", "RuntimeError", "unable to allocate", "memory"),
    ("", "", "std::bad_alloc", "memory"),
    ("", "OSError", "cannot allocate memory", "memory"),
    ("", "XGBoostError", "bad_alloc", "memory"),
)
_UNITS = {"": 1, "b": 1, "bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_REQUESTED = re.compile(
    r"(?:tried to allocate|trying to allocate|unable to allocate|failed to allocate)"
    r"\s+([\d.]+)\s*([kmgt]ib|bytes)?"
)


def find_shortage(error: BaseException) -> Shortage | None:
    """Return the shortage behind an exception, looking through its causes; None for any other.

    A ``MemoryError`` that Python code raised by itself is no shortage.
    """
    for link in _chain(error):
        found = _match(link)
        if found is not None:
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _match(error: BaseException) -> Shortage | None:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything
        message = ""
    text = message.lower()
    root = type(error).__module__.partition(".")[0].removesuffix("lib")
    names = {c.__name__ for c in type(error).__mro__}
    for module, name, words, resource in _CLASSES:
        fits = (not module or module == root) and (not name or name in names)
        if (
            fits
            and words in text
            and not (resource == "memory" and isinstance(error, MemoryError))
        ):
            return Shortage(resource, _requested(text), message)  # type: ignore[arg-type]
    # Last: libraries raise it for a GPU's memory as well.
    if not isinstance(error, MemoryError) or _was_raised_by_python(error.__traceback__):
        return None
    return Shortage("memory", _array_size(error) or _requested(text))


def _array_size(error: MemoryError) -> float | None:
    """Return the bytes of the array that numpy could not allocate."""
    shape: Any = getattr(error, "shape", None)
    size = getattr(getattr(error, "dtype", None), "itemsize", None)
    if shape is None or size is None:
        return None
    return float(size) * math.prod(float(n) for n in shape)


def _requested(text: str) -> float | None:
    found = _REQUESTED.search(text)
    if found is None:
        return None
    return float(found[1]) * _UNITS[found[2] or ""]


def _was_raised_by_python(traceback: TracebackType | None) -> bool:
    """Return whether the innermost frame stands at a ``raise`` statement."""
    if traceback is None:
        return True
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code.co_code
    position = traceback.tb_lasti
    if not 0 <= position < len(code):
        return False
    return dis.opname[code[position]] == "RAISE_VARARGS"
