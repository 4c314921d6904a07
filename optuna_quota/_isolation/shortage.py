"""Recognises the many forms in which Python code says that memory ran out."""

from __future__ import annotations

from collections.abc import Collection
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


# What a program that is no Python says on its standard error when it is refused memory.
_SAID = ("std::bad_alloc", "cannot allocate memory", "can't allocate memory")
_MOST_TEXT = 1 << 18


def find_shortage(error: BaseException) -> Shortage | None:
    """Return the shortage behind an exception, None for any other.

    It looks through the exception's causes, and through the tracebacks and error output that it
    quotes: of a worker of a pool or DataLoader, of a failed subprocess, of the fits that a search
    counted as failed. A ``MemoryError`` that Python code raised by itself is none.
    """
    for link in _chain(error):
        found = _match(link)
        if found is not None:
            return found
    return None


def find_shortage_in_text(text: str) -> Shortage | None:
    """Return the shortage that ends a traceback in a text, None without one."""
    for name, message, source in _raised_in(text[-_MOST_TEXT:]):
        found = _match_named(name, {name.rpartition(".")[2]}, message)
        if found is not None:
            return found
        if name.endswith("MemoryError") and _is_refusal(message, source):
            return Shortage("memory", _requested(message.lower()))
    return None


def _is_refusal(message: str, source: str) -> bool:
    """Return whether a MemoryError that is told of in text came of an allocation."""
    if source:
        return not source.startswith("raise")
    # Python itself says nothing, numpy what it wanted; without the line, a text is somebody's own.
    return not message or message.startswith("Unable to allocate")


def _raised_in(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield class, message and innermost source line of each exception with a traceback."""
    indent, source = -1, ""
    for line in text.splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped.endswith("Traceback (most recent call last):"):
            indent, source = depth, ""
        elif indent < 0 or not stripped:
            continue
        elif stripped.startswith('File "'):
            source = ""
        elif depth > indent:
            source = source or stripped
        else:
            name, _, message = stripped.partition(": ")
            yield name.rstrip(":"), message, source
            indent = -1


def _quoted(error: BaseException) -> Iterator[str]:
    """Yield the output of other processes that an exception quotes beside its message."""
    for attribute in ("stderr", "stdout"):
        said = getattr(error, attribute, None)
        if isinstance(said, bytes):
            said = said.decode(errors="replace")
        if isinstance(said, str):
            yield said[-_MOST_TEXT:]


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
    names = {c.__name__ for c in type(error).__mro__}
    found = _match_named(f"{type(error).__module__}.", names, message)
    if isinstance(error, MemoryError) and (found is None or found.resource == "memory"):
        # Last: libraries raise it for a GPU's memory as well.
        found = None
        if not _was_raised_by_python(error.__traceback__):
            return Shortage("memory", _array_size(error) or _requested(message.lower()))
    found = found or find_shortage_in_text(message)
    if found is not None:
        return found
    for said in _quoted(error):
        found = find_shortage_in_text(said)
        if found is None and any(words in said.lower() for words in _SAID):
            found = Shortage("memory")
        if found is not None:
            return found
    return None


def _match_named(path: str, names: Collection[str], message: str) -> Shortage | None:
    root, lower = path.partition(".")[0].removesuffix("lib"), message.lower()
    for module, name, words, resource in _CLASSES:
        fits = (not module or module == root) and (not name or name in names)
        if fits and words in lower:
            return Shortage(resource, _requested(lower), message)  # type: ignore[arg-type]
    return None


def _array_size(error: MemoryError) -> float | None:
    """Return the bytes of the array that numpy could not allocate."""
    shape: Any = getattr(error, "shape", None)
    size = getattr(getattr(error, "dtype", None), "itemsize", None)
    if shape is None or size is None:
        return None
    return float(size) * math.prod(float(n) for n in shape)


def _requested(text: str) -> float | None:
    found = _REQUESTED.search(text)
    return None if found is None else _amount(found)


def _amount(found: re.Match[str]) -> float:
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
