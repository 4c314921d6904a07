"""Sizes, durations and energies: text in, SI base units out, and back for people.

Everything inside the library is a ``float`` in SI base units (bytes, seconds, joules). Text with
units exists only at the edge, and this module is that edge.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from numbers import Real
import re


_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_JOULES = {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6, "MWh": 3.6e9}

# Amounts from here on tell a person nothing but their order; so do NaN and infinity.
_BEYOND = 1e15

_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµ]*)"
)


def parse_bytes(value: float | str, name: str) -> float:
    """Return a size in bytes from a number of bytes or a string with its unit.

    Args:
        value: Bytes, or text such as ``"2GiB"`` or ``"500MB"``.
        name: What the value is for; it stands in the error.

    Raises:
        ValueError: If the text has no unit or an unknown one, or the value is not positive and
            finite.
        TypeError: If ``value`` is neither a number nor a string.
    """
    return _parse(
        value, name, _BYTES, "a size in bytes or a string with its unit ('2GiB', '500MB')"
    )


def parse_seconds(value: float | str, name: str) -> float:
    """Return a duration in seconds from a number of seconds or text such as ``"1h30min"``.

    Args:
        value: Seconds, or one or more quantities with their units.
        name: What the value is for; it stands in the error.

    Raises:
        ValueError: If the text has no unit or an unknown one, or the value is not positive and
            finite.
        TypeError: If ``value`` is neither a number nor a string.
    """
    rule = "a duration in seconds or a string with its unit ('90s', '5min', '1h30min')"
    return _parse(value, name, _SECONDS, rule)


def parse_joules(value: float | str, name: str) -> float:
    """Return an energy in joules from a number of joules or text such as ``"2kWh"``."""
    return _parse(value, name, _JOULES, "an energy in joules or a string with its unit ('2kWh')")


def parse_number(value: float | str, name: str) -> float:
    """Return a positive finite number that has no unit, such as a count of cores or a price.

    Args:
        value: The number. Text is refused here: the command line converts its own.
        name: What the value is for; it stands in the error.
    """
    if isinstance(value, str):
        raise ValueError(f"`{name}` must be a positive number but got {value!r}.")
    return _positive(value, name, "a positive number")


def parse_count(value: int, name: str) -> int:
    """Return a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a positive whole number but got {value!r}.")
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number but got {value!r}.")
    return int(value)


def format_bytes(value: float) -> str:
    """Return a size for a person, such as ``"1.5 GiB"``."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if abs(value) >= _BYTES[unit]:
            return f"{_short(value / _BYTES[unit])} {unit}"
    return f"{_short(value)} B"


def format_seconds(value: float) -> str:
    """Return a duration for a person, such as ``"1 h 30 min"`` or ``"2.5 s"``."""
    if abs(value) < 1:
        return f"{_short(value * 1e3)} ms"
    if abs(value) < 60:
        return f"{_short(value)} s"
    if not abs(value) < _BEYOND:
        return f"{value:.3g} s"
    total = round(value)
    days, rest = divmod(abs(total), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next(i for i, (count, _) in enumerate(parts) if count)
    text = " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
    return f"-{text}" if total < 0 else text


def format_joules(value: float) -> str:
    """Return an energy for a person, such as ``"1.2 kWh"``."""
    for unit in ("MWh", "kWh", "Wh"):
        if abs(value) >= _JOULES[unit]:
            return f"{_short(value / _JOULES[unit])} {unit}"
    return f"{_short(value)} J"


def format_number(value: float) -> str:
    """Return a plain number for a person: at most four significant digits, no exponent."""
    return _short(value)


def compact_bytes(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_bytes` reads as exactly ``value``."""
    return _compact(value, _BYTES, ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"))


def compact_seconds(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_seconds` reads as exactly ``value``."""
    return _compact(value, _SECONDS, ("d", "h", "min", "s"))


def compact_joules(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_joules` reads as exactly ``value``."""
    return _compact(value, _JOULES, ("kWh", "Wh", "kJ", "J"))


def _parse(value: float | str, name: str, units: Mapping[str, float], rule: str) -> float:
    if isinstance(value, str):
        return _positive(_parse_text(value, name, units, rule), name, rule, value)
    return _positive(value, name, rule)


def _parse_text(text: str, name: str, units: Mapping[str, float], rule: str) -> float:
    position, total = 0, 0.0
    stripped = text.strip()
    while position < len(stripped) or not stripped:
        match = _QUANTITY.match(stripped, position)
        if match is None:
            raise ValueError(f"`{name}` must be {rule} but got {text!r}.")
        unit = match["unit"]
        if not unit:
            raise ValueError(
                f"`{name}` must be {rule} but got {text!r}: the number {match['number']} "
                "has no unit."
            )
        if unit not in units:
            known = ", ".join(units)
            raise ValueError(
                f"`{name}` must be {rule} but got {text!r}: unknown unit {unit!r}, "
                f"known are {known}."
            )
        total += float(match["number"]) * units[unit]
        if float(match["number"]) < 0:
            return float(match["number"])
        position = match.end()
    return total


def _positive(value: float, name: str, rule: str, given: object = None) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be {rule} but got {value!r}.")
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        shown = value if given is None else given
        raise ValueError(f"`{name}` must be positive and finite: {rule}, but got {shown!r}.")
    return number


def _short(value: float) -> str:
    if not abs(value) < _BEYOND:
        return f"{value:.3g}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _compact(
    value: float, units: Mapping[str, float], order: tuple[str, ...]
) -> str | int | float:
    for unit in order:
        count = value / units[unit]
        if count >= 1 and round(count, 1) * units[unit] == value and count < 10**4:
            return f"{_short(count) if count < 100 else f'{count:g}'}{unit}"
    return int(value) if value == int(value) else value
