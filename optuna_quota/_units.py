"""Sizes, durations and energies: parse text into SI base units, and format them as text.

Everything inside the library is a ``float`` in SI base units (bytes, seconds, joules).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
import math
from numbers import Real
import re
import signal
from typing import Any, TypeAlias


Duration: TypeAlias = "float | str | timedelta"

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
# What people write as well; "G" is "GB" and not "GiB": where the other was meant, that errs on
# the side that holds.
_SHORT_BYTES = {f"{prefix}{i}": _BYTES[f"{prefix}{i}B"] for prefix in "KMGTP" for i in ("", "i")}
_LONG_SECONDS = {
    word: _SECONDS[unit]
    for unit, words in {
        "s": ("sec", "secs", "second", "seconds"),
        "min": ("m", "mins", "minute", "minutes"),
        "h": ("hr", "hrs", "hour", "hours"),
        "d": ("day", "days"),
    }.items()
    for word in words
}
_JOULES = {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6, "MWh": 3.6e9}

_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµ%]*)"
)
# As clocks and batch systems show it: hours may pass 24, days may stand before them.
_CLOCK = re.compile(r"\s*(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d(?:\.\d*)?)\s*", re.ASCII)
# No process is smaller: a bare number below this was meant in another unit.
_SMALLEST = _BYTES["MiB"]
# From here on, as for NaN and infinity, only the order of magnitude is shown.
_HUGE = 1e15


def parse_bytes(value: float | str, name: str, *, zero: bool = False) -> float:
    """Return a size in bytes from a number of bytes or a string such as ``"2GiB"`` or ``"2G"``.

    Args:
        value: Bytes, or one or more quantities with their units.
        name: Name of the argument, for the error message.
        zero: Whether it may be 0.

    Raises:
        ValueError: If the text has no unit or an unknown one, or the value is not positive and
            finite.
        TypeError: If ``value`` is neither a number nor a string.
    """
    rule = "a size in bytes or a string with its unit ('2GiB', '500MB')"
    return _parse(value, name, _BYTES, rule, _SHORT_BYTES, zero=zero)


def check_bare_sizes(**sizes: Any) -> None:
    """Raise ValueError for a bare number of bytes that can only be meant in another unit."""
    for name, value in sizes.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if is_number and 0 < float(value) < _SMALLEST:
            unit = "GiB" if value < 1024 else "MiB"
            raise ValueError(
                f"`{name}` must be a size in bytes or a string with its unit but got {value!r}, "
                f"and no process fits into {value:g} bytes. Did you mean '{value:g}{unit}'?"
            )


def parse_seconds(value: Duration, name: str, *, zero: bool = False) -> float:
    """Return a duration in seconds.

    Args:
        value: Seconds, a timedelta, quantities with their units as text (``"1h30min"``,
            ``"2 hours"``), or hours, minutes and seconds (``"01:30:00"``).
        name: Name of the argument, for the error message.
        zero: Whether it may be 0.

    Raises:
        ValueError: If the text has no unit or an unknown one, or the value is not positive and
            finite.
        TypeError: If ``value`` is neither a number nor a string nor a timedelta.
    """
    rule = "a duration in seconds or a string with its unit ('90s', '1h30min', '01:30:00')"
    if isinstance(value, timedelta):
        return _checked(value.total_seconds(), name, rule, value, zero=zero)
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value)):
        days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        return _checked(total, name, rule, value, zero=zero)
    return _parse(value, name, _SECONDS, rule, _LONG_SECONDS, zero=zero)


def parse_joules(value: float | str, name: str, *, zero: bool = False) -> float:
    """Return an energy in joules from a number of joules or a string such as ``"2kWh"``.

    Arguments and errors are those of :func:`parse_bytes`.
    """
    rule = "an energy in joules or a string with its unit ('2kWh')"
    return _parse(value, name, _JOULES, rule, zero=zero)


def parse_number(value: float, name: str, *, zero: bool = False) -> float:
    """Return a finite number without a unit, such as a count of cores or a price."""
    if isinstance(value, str):
        raise ValueError(f"`{name}` must be a positive number but got {value!r}.")
    return _checked(value, name, "a number" if zero else "a positive number", zero=zero)


def parse_count(value: int, name: str) -> int:
    """Return a positive whole number."""
    rule = f"`{name}` must be a positive whole number but got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(rule)
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise ValueError(rule)
    return int(value)


def format_bytes(value: float) -> str:
    """Return a size such as ``"1.5 GiB"``."""
    return _format(value, _BYTES, ("PiB", "TiB", "GiB", "MiB", "KiB", "B"))


def format_seconds(value: float) -> str:
    """Return a duration such as ``"1 h 30 min"`` or ``"2.5 s"``."""
    if abs(value) < 1:
        return f"{format_number(value * 1e3)} ms"
    if abs(value) < 60:
        return f"{format_number(value)} s"
    if not abs(value) < _HUGE:
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
    """Return an energy such as ``"1.2 kWh"``."""
    return _format(value, _JOULES, ("MWh", "kWh", "Wh", "J"))


def format_number(value: float) -> str:
    """Return a number with all digits before the point and at least three significant ones."""
    if not abs(value) < _HUGE:
        return f"{value:.3g}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def compact_bytes(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_bytes` reads as exactly ``value``."""
    size = _compact(value, _BYTES, ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"))
    return size if isinstance(size, str) or size >= _SMALLEST else f"{size!r}B"


def compact_seconds(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_seconds` reads as exactly ``value``."""
    return _compact(value, _SECONDS, ("d", "h", "min", "s"))


def compact_joules(value: float) -> str | int | float:
    """Return the shortest input that :func:`parse_joules` reads as exactly ``value``."""
    return _compact(value, _JOULES, ("kWh", "Wh", "kJ", "J"))


@dataclass(frozen=True)
class Unit:
    """How amounts in one SI base unit are read and written.

    Attributes:
        symbol: The unit's symbol, empty for a plain number.
        parse: Returns an amount from text or a number and the argument's name; 0 with
            ``zero=True`` only.
        format: Returns an amount as text with its unit.
        compact: Returns the shortest input that ``parse`` reads as exactly that amount.
    """

    symbol: str
    parse: Callable[..., float]
    format: Callable[[float], str]
    compact: Callable[[float], str | int | float]


BYTES = Unit("B", parse_bytes, format_bytes, compact_bytes)
SECONDS = Unit("s", parse_seconds, format_seconds, compact_seconds)
JOULES = Unit("J", parse_joules, format_joules, compact_joules)
NUMBER = Unit("", parse_number, format_number, float)
COUNT = Unit("", parse_count, format_number, int)


def _parse(
    value: float | str,
    name: str,
    units: Mapping[str, float],
    rule: str,
    aliases: Mapping[str, float] | None = None,
    *,
    zero: bool = False,
) -> float:
    number: Any = value
    if isinstance(value, str):
        number = _parse_text(value, name, units, rule, aliases or {})
    return _checked(number, name, rule, value, zero=zero)


def _parse_text(
    text: str, name: str, units: Mapping[str, float], rule: str, aliases: Mapping[str, float]
) -> float:
    factors = {**units, **aliases}
    position, total = 0, 0.0
    stripped = text.strip()
    while position < len(stripped) or not stripped:
        match = _QUANTITY.match(stripped, position)
        if match is None:
            raise ValueError(f"`{name}` must be {rule} but got {text!r}.")
        number, unit = match["number"], match["unit"]
        if unit not in factors:
            hint = _hint(unit, units, factors) if unit else f"the number {number} has no unit."
            raise ValueError(f"`{name}` must be {rule} but got {text!r}: {hint}")
        if float(number) < 0:
            return float(number)
        total += float(number) * factors[unit]
        position = match.end()
    return total


def format_signal(number: int) -> str:
    """Return the name of a signal, as ``SIGTERM``; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(unit: str, known: Mapping[str, float], accepted: Mapping[str, float]) -> str:
    """Return the unit that differs in case alone, else those that are known."""
    meant = [each for each in accepted if each.lower() == unit.lower()]
    listed = f"did you mean {meant[0]}?" if meant else f"known are {', '.join(known)}."
    return f"unknown unit {unit!r}, {listed}"


def _checked(
    value: float, name: str, rule: str, given: object = None, *, zero: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be {rule} but got {value!r}.")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        shown = value if given is None else given
        sign = "nonnegative" if zero else "positive"
        raise ValueError(f"`{name}` must be {sign} and finite: {rule}, but got {shown!r}.")
    return number


def _format(value: float, units: Mapping[str, float], order: tuple[str, ...]) -> str:
    unit = next((unit for unit in order if abs(value) >= units[unit]), order[-1])
    return f"{format_number(value / units[unit])} {unit}"


def _compact(
    value: float, units: Mapping[str, float], order: tuple[str, ...]
) -> str | int | float:
    for unit in order:
        count = value / units[unit]
        if count >= 1 and round(count, 1) * units[unit] == value and count < 10**4:
            return f"{format_number(count) if count < 100 else f'{count:g}'}{unit}"
    return int(value) if value == int(value) else value
