"""What a script prints: lines of bytes, and the values in them. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
import json
from typing import Any


# Bytes of a line that are kept; a longer one is passed on in pieces and holds no value.
MAX_LINE = 1 << 20


class LineSplitter:
    """Splits a stream of bytes into lines of text, whatever bytes they are."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [_decode(line) for line in lines]

    def end(self) -> list[str]:
        """Return what is left: the last line, when the stream ends without a newline."""
        rest, self._rest = self._rest, b""
        return [_decode(rest)] if rest else []


def _decode(line: bytes) -> str:
    # Progress bars draw over their line; the last drawing is what a terminal shows.
    text = line.decode("utf-8", "replace").rstrip("\r")
    return text.rpartition("\r")[2]


@dataclass(frozen=True)
class IntermediateValue:
    """A line ``{"step": …, "value": …}``."""

    step: int
    value: float


@dataclass(frozen=True)
class FinalValue:
    """A line ``{"value": …}`` or ``{"values": […]}``."""

    value: float | list[float]


def find_values(line: str) -> list[IntermediateValue | FinalValue]:
    """Return the values in a line, none for any other line.

    Processes that share the output, such as ranks, may print two objects into one line.
    """
    found, rest = [], line.strip()
    while rest.startswith("{"):
        try:
            content, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found.append(_value_of(content))
        rest = rest[end:].lstrip()
    return [] if rest else [value for value in found if value is not None]


_DECODER = json.JSONDecoder()


def _value_of(content: dict[str, Any]) -> IntermediateValue | FinalValue | None:
    value = _number(content.get("value"))
    if "step" in content:
        step = _number(content["step"])
        if value is None or step is None or not step.is_integer() or step < 0:
            return None
        return IntermediateValue(int(step), value)
    if value is not None:
        return FinalValue(value)
    values = content.get("values")
    numbers = [_number(v) for v in values] if isinstance(values, list) else []
    known = [number for number in numbers if number is not None]
    return FinalValue(known) if known and len(known) == len(numbers) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
