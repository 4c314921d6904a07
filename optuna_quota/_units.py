"""Sizes, durations and energies: parse text into SI base units, and format them as text; lines.

Everything inside the library is a ``float`` in SI base units (bytes, seconds, joules).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
import math
from numbers import Real
import re
import signal
import textwrap
from typing import Any, TypeAlias


Duration: TypeAlias = "float | str | timedelta"

_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµ%]*)"
)
# As clocks and batch systems show it: hours may pass 24, days may stand before them.
_CLOCK = re.compile(r"\s*(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d(?:\.\d*)?)\s*", re.ASCII)
# No process is smaller: a bare number below this was probably not meant in bytes.
_SMALLEST = 2**20
# Larger numbers are shown in scientific notation.
_HUGE = 1e15
# Of the lines of a terminal.
LINE_WIDTH = 99


@dataclass(frozen=True, eq=False)
class Unit:
    """How amounts in one SI base unit are read and written."""

    symbol: str  # The unit's symbol, empty for a plain number
    rule: str  # What an argument must be, for error messages
    # The units that text may have, from the smallest on, each in the base unit
    units: dict[str, float] = field(default_factory=dict)
    aliases: Mapping[str, float] = field(default_factory=dict)  # Other accepted spellings
    shown: tuple[str, ...] = ()  # The units of formatted amounts, from the largest on

    def parse(self, value: Any, name: str, *, zero: bool = False) -> float:
        """Return an amount from a number in the base unit, or quantities with units as text.

        Args:
            value: The number or text, such as ``"2GiB"`` or ``"1h30min"``.
            name: Name of the argument, for the error message.
            zero: Whether it may be 0.

        Raises:
            ValueError: If the text has no unit or an unknown one, or the value is not positive
                and finite.
            TypeError: If ``value`` is neither a number nor text.
        """
        number = self._parse_text(value, name) if isinstance(value, str) else value
        return _checked(number, name, self.rule, value, zero=zero)

    def _parse_text(self, text: str, name: str) -> float:
        factors = {**self.units, **self.aliases}
        position, total = 0, 0.0
        stripped = text.strip()
        while position < len(stripped) or not stripped:
            match = _QUANTITY.match(stripped, position)
            if match is None:
                raise ValueError(f"`{name}` must be {self.rule} but got {text!r}.")
            number, unit = match["number"], match["unit"]
            if unit not in factors:
                hint = self._hint(unit) if unit else f"the number {number} has no unit."
                raise ValueError(f"`{name}` must be {self.rule} but got {text!r}: {hint}")
            if float(number) < 0:
                return float(number)
            total += float(number) * factors[unit]
            position = match.end()
        return total

    def _hint(self, unit: str) -> str:
        """Return the unit that differs in case alone, else those that are known."""
        meant = [u for u in (*self.units, *self.aliases) if u.lower() == unit.lower()]
        listed = f"did you mean {meant[0]}?" if meant else f"known are {', '.join(self.units)}."
        return f"unknown unit {unit!r}, {listed}"

    def format(self, value: float) -> str:
        """Return an amount as text with its unit, such as ``"1.5 GiB"``."""
        unit = next((u for u in self.shown if abs(value) >= self.units[u]), self.shown[-1])
        return f"{format_number(value / self.units[unit])} {unit}"

    def compact(self, value: float) -> str | int | float:
        """Return the shortest input that :meth:`parse` reads as exactly ``value``."""
        for unit, factor in reversed(self.units.items()):
            count = value / factor
            is_exact = factor >= 1 and round(count, 1) * factor == value
            if is_exact and 1 <= count < 10**4:
                return f"{format_number(count) if count < 100 else f'{count:g}'}{unit}"
        number = int(value) if value == int(value) else value
        # A bare number of bytes that no process fits into is refused.
        return f"{number!r}B" if self.symbol == "B" and number < _SMALLEST else number


class _Seconds(Unit):
    def parse(self, value: Any, name: str, *, zero: bool = False) -> float:
        """Return a duration; also from a timedelta, or a clock such as ``"01:30:00"``."""
        number = value
        if isinstance(value, timedelta):
            number = value.total_seconds()
        elif isinstance(value, str) and (clock := _CLOCK.fullmatch(value)):
            days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
            number = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if number is value:
            return super().parse(value, name, zero=zero)
        return _checked(number, name, self.rule, value, zero=zero)

    def format(self, value: float) -> str:
        """Return a duration such as ``"1 h 30 min"`` or ``"2.5 s"``."""
        if abs(value) < 0.9995:
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


class _Number(Unit):
    def parse(self, value: Any, name: str, *, zero: bool = False) -> float:
        """Return a finite number without a unit, such as a number of cores or a price."""
        if isinstance(value, str):
            raise ValueError(f"`{name}` must be {self.rule} but got {value!r}.")
        return _checked(value, name, "a number" if zero else self.rule, value, zero=zero)

    def format(self, value: float) -> str:
        return format_number(value)

    def compact(self, value: float) -> str | int | float:
        return float(value)


class _Count(_Number):
    def parse(self, value: Any, name: str, *, zero: bool = False) -> int:
        """Return a positive whole number."""
        check_number(value, name, self.rule, lambda n: n >= 1 and as_float(n).is_integer())
        return int(as_float(value))

    def format(self, value: float) -> str:
        """Return a count as in sentences, such as ``"2,000"``."""
        text = format_number(value)
        return f"{int(text):,}" if text.isdecimal() else text

    def compact(self, value: float) -> int:
        return int(value)


_DECIMAL = {f"{prefix}B": 10 ** (3 * i) for i, prefix in enumerate(("", "k", "M", "G", "T", "P"))}
_BINARY = {f"{prefix}iB": 2 ** (10 * i) for i, prefix in enumerate("KMGTP", 1)}
_LONG_SECONDS = {
    **dict.fromkeys(("sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("day", "days"), 86400.0),
}

BYTES = Unit(
    "B",
    "a size in bytes or a string with its unit ('2GiB', '500MB')",
    {**_DECIMAL, **_BINARY},
    # "G" is "GB" and not "GiB": the smaller one, in case the other was meant.
    {"KB": 1000, "K": 1000} | {u[:-1]: n for u, n in (_DECIMAL | _BINARY).items() if n > 1000},
    ("PiB", "TiB", "GiB", "MiB", "KiB", "B"),
)
SECONDS = _Seconds(
    "s",
    "a duration in seconds or a string with its unit ('90s', '1h30min', '01:30:00')",
    {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    _LONG_SECONDS,
)
JOULES = Unit(
    "J",
    "an energy in joules or a string with its unit ('2kWh')",
    {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6, "MWh": 3.6e9},
    shown=("MWh", "kWh", "Wh", "J"),
)
NUMBER = _Number("", "a positive number")
COUNT = _Count("", "a positive whole number")

parse_bytes = BYTES.parse
parse_seconds = SECONDS.parse
format_bytes = BYTES.format
format_seconds = SECONDS.format


def is_number(value: Any) -> bool:
    """Return whether a value is a number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_bare_sizes(**sizes: Any) -> None:
    """Raise ValueError for a bare number that is too small to be meant in bytes."""
    for name, value in sizes.items():
        if is_number(value) and 0 < value < _SMALLEST:
            unit = "GiB" if value < 1024 else "MiB" if value < 100_000 else "KiB"
            raise ValueError(
                f"`{name}` must be a size in bytes or a string with its unit but got {value!r}, "
                f"and no process fits into {value:.15g} bytes. Did you mean '{value:.15g}{unit}'?"
            )


def format_number(value: float) -> str:
    """Return a number with all digits before the point and at least three significant ones."""
    if not abs(value) < _HUGE:
        return f"{value:.3g}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 trial", "2 trials"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def wrap(text: str, indent: str = "", first: str = "") -> list[str]:
    """Return a text as lines for a terminal, with an indent and that of the first line."""
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=first, subsequent_indent=indent)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines for a terminal.

    The first column is aligned to the left, the others, which are figures, to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def format_signal(number: int) -> str:
    """Return the name of a signal, as ``SIGTERM``; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless a value is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False but got {value!r}.")


def check_mapping(value: Any, name: str, rule: str) -> None:
    """Raise TypeError unless a value is a mapping whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` must map {rule} but got {value!r}.")


def check_number(
    value: Any, name: str, rule: str, is_valid: Callable[[Any], bool] | None = None
) -> None:
    """Raise TypeError unless a value is a number, ValueError unless it is a valid one."""
    message = f"`{name}` must be {rule} but got {value!r}."
    if not is_number(value):
        raise TypeError(message)
    if is_valid is not None and not is_valid(value):
        raise ValueError(message)


def check_confidence(value: Any) -> None:
    """Raise an error unless a value is a confidence."""
    check_number(value, "confidence", "above 0.5 and below 1", lambda c: 0.5 < c < 1)


def as_float(value: Any) -> float:
    """Return a number as a float, infinity for a whole one with more digits than fit."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _checked(value: Any, name: str, rule: str, given: object, *, zero: bool) -> float:
    check_number(value, name, rule)
    number = as_float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        sign = "nonnegative" if zero else "positive"
        raise ValueError(f"`{name}` must be {sign} and finite: {rule}, but got {given!r}.")
    return number
