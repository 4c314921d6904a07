"""Exceptions that cross a process boundary with their type, causes and traceback.

Pickling alone drops the traceback and fails on many exceptions. Here each frame travels as file,
line and function, and is rebuilt on the other side as a real traceback: it prints the source lines
(those of a notebook's cells too, which only the study's process knows) as if the error had been
raised there.
"""

from __future__ import annotations

from dataclasses import dataclass
import pickle
import sys
from types import CodeType
from types import FrameType
from types import TracebackType
from typing import Any

from optuna_quota._isolation.channel import dumps


_OWN = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Frame:
    """One line of a traceback."""

    filename: str
    function: str
    line: int
    module: str


@dataclass(frozen=True)
class SentError:
    """An exception on its way.

    Attributes:
        data: The exception, pickled in a form that was seen to load.
        plain: The same by its nearest built-in class, for where its own is not found.
        frames: Its traceback, outermost first.
        cause: What it was raised from.
        context: What was being handled.
        suppress_context: Whether the context is hidden.
    """

    data: bytes
    plain: bytes
    frames: tuple[Frame, ...]
    cause: SentError | None = None
    context: SentError | None = None
    suppress_context: bool = False


def pack_error(error: BaseException, _seen: frozenset[int] = frozenset()) -> SentError:
    """Return an exception ready to be sent."""
    seen = _seen | {id(error)}
    cause, context = (
        None if e is None or id(e) in seen else pack_error(e, seen)
        for e in (error.__cause__, error.__context__)
    )
    return SentError(
        _dump(error),
        dumps(_by_base(error)),
        tuple(_frames(error.__traceback__)),
        cause,
        None if cause is not None and error.__context__ is error.__cause__ else context,
        error.__suppress_context__,
    )


def unpack_error(sent: SentError) -> BaseException:
    """Return the exception as it was raised, with a traceback that shows where."""
    try:
        error: BaseException = pickle.loads(sent.data)
    except Exception:  # noqa: BLE001 - its module may be found only where it was raised
        error = pickle.loads(sent.plain)
    error.__cause__ = None if sent.cause is None else unpack_error(sent.cause)
    error.__context__ = None if sent.context is None else unpack_error(sent.context)
    error.__suppress_context__ = sent.suppress_context
    return error.with_traceback(_traceback(sent.frames))


def _dump(error: BaseException) -> bytes:
    """Return the pickle of an exception, simplified as far as it must be to load again."""
    for simplify in (_as_it_is, _by_state, _by_base):
        try:
            data = dumps(simplify(error))
            if isinstance(pickle.loads(data), BaseException):
                return data
        except Exception:  # noqa: BLE001 - a user's __reduce__ or __init__ may raise anything
            continue
    return dumps(RuntimeError(_describe(error)))


def _as_it_is(error: BaseException) -> Any:
    return error


class _Stripped:
    """Pickles as an exception of a class with what of its state can be pickled."""

    def __init__(self, kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]):
        self._parts = (kind, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, self._parts)


def _by_state(error: BaseException) -> Any:
    """Keep the class but don't call it: its `__init__` may ask for other arguments."""
    args = tuple(a if _can_pickle(a) else repr(a) for a in error.args)
    state = {k: v for k, v in vars(error).items() if _can_pickle(v)}
    return _Stripped(type(error), args, state)


def _by_base(error: BaseException) -> Any:
    """Keep the nearest base class that every process has."""
    base = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
    return _Stripped(base, (_describe(error),), {})


def _restore(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything
        return type(error).__name__


def _can_pickle(value: Any) -> bool:
    try:
        pickle.loads(dumps(value))
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return False
    return True


def _frames(traceback: TracebackType | None) -> list[Frame]:
    frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        module = traceback.tb_frame.f_globals.get("__name__", "")
        name = getattr(code, "co_qualname", code.co_name)
        frames.append(Frame(code.co_filename, name, traceback.tb_lineno, str(module)))
        traceback = traceback.tb_next
    # The frames above the objective are ours and tell a user nothing.
    while frames and frames[0].module.startswith(_OWN):
        frames.pop(0)
    return frames


def _traceback(frames: tuple[Frame, ...]) -> TracebackType | None:
    traceback: TracebackType | None = None
    for frame in reversed(frames):
        stub, instruction = _stub_frame(frame)
        traceback = TracebackType(traceback, stub, instruction, frame.line)
    return traceback


def _stub_frame(frame: Frame) -> tuple[FrameType, int]:
    """Return a frame that bears the name of another, and its instruction.

    Frames can only be made by running code, so a stub is run that raises on the same line.
    """
    code = compile("\n" * (frame.line - 1) + "raise LookupError", frame.filename, "exec")
    code = code.replace(co_name=frame.function.rpartition(".")[2])
    if sys.version_info >= (3, 11):
        code = _without_columns(code, frame.line).replace(co_qualname=frame.function)
    try:
        exec(code, {"__name__": frame.module, "__file__": frame.filename})
    except LookupError as error:
        traceback = error.__traceback__
        assert traceback is not None and traceback.tb_next is not None
        return traceback.tb_next.tb_frame, traceback.tb_next.tb_lasti
    raise AssertionError("The stub did not raise.")


def _without_columns(code: CodeType, line: int) -> CodeType:
    """Return code all of which is on one line, at no columns: a stub's are not the source's.

    Each entry of the table says for up to 8 code units: no columns (kind 13), no change of line.
    See Objects/locations.md of CPython.
    """
    units = len(code.co_code) // 2
    lengths = [min(8, units - start) for start in range(0, units, 8)]
    table = b"".join(bytes([0x80 | 13 << 3 | length - 1, 0]) for length in lengths)
    return code.replace(co_firstlineno=line, co_linetable=table)
