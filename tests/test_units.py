"""Parsing and formatting of sizes, durations and energies."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given, strategies as st
import numpy as np
import pytest

from optuna_quota import _units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 2**30),
        ("500MB", 500e6),
        ("1.5 GiB", 1.5 * 2**30),
        (".5KiB", 512),
        ("1e3kB", 1e6),
        ("7B", 7),
        (" 3TB ", 3e12),
        ("4G", 4e9),
        ("4Gi", 4 * 2**30),
        ("512 M", 512e6),
        (4096, 4096),
        (np.float32(8), 8),
        (np.int64(9), 9),
    ],
)
def test_sizes(text: str | float, expected: float) -> None:
    value = _units.BYTES.parse(text, "memory")
    assert value == expected
    assert type(value) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90),
        ("5min", 300),
        ("1h30min", 5400),
        ("1h 30 min", 5400),
        ("2d", 172800),
        ("250ms", 0.25),
        ("1.5h", 5400),
        (12.5, 12.5),
        ("1h30m", 5400),
        ("2 hours", 7200),
        ("1 day 2 hrs", 93600),
        ("01:30:00", 5400),
        ("100:00:00.5", 360000.5),
        ("1-12:00:00", 129600),
        (timedelta(hours=1, milliseconds=500), 3600.5),
    ],
)
def test_durations(text: str | float | timedelta, expected: float) -> None:
    assert _units.parse_seconds(text, "wall_time") == expected


def test_energies() -> None:
    assert _units.JOULES.parse("2kWh", "energy") == 7.2e6
    assert _units.JOULES.parse("3MJ", "energy") == 3e6


@pytest.mark.parametrize(
    "value",
    [
        "4",
        "1GiB 4",
        "-1GiB",
        "nan",
        "0GiB",
        "4XB",
        "",
        "  ",
        "GiB",
        "1h",
        "4gib",
        "1,5GiB",
        "infGiB",
    ]
    + ["1GiB -2MiB", 0, -1, float("nan"), float("inf"), -float("inf")],
)
def test_an_invalid_size(value: str | float) -> None:
    with pytest.raises(ValueError) as info:
        _units.BYTES.parse(value, "memory")
    message = str(info.value)
    assert "`memory`" in message
    assert "size in bytes or a string with its unit" in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [True, None, [1], b"2GiB", 1j])
def test_a_value_of_the_wrong_type(value: object) -> None:
    with pytest.raises(TypeError, match="`memory` must be") as info:
        _units.BYTES.parse(value, "memory")  # type: ignore[arg-type]
    assert repr(value) in str(info.value)


def test_an_unknown_unit_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown unit 'w', known are ms, s, min, h, d\."):
        _units.parse_seconds("5w", "wall_time")
    for text, meant in (("4gb", "GB"), ("4g", "G"), ("1mib", "MiB")):
        with pytest.raises(ValueError, match=rf"unknown unit .*, did you mean {meant}\?$"):
            _units.BYTES.parse(text, "memory")


@pytest.mark.parametrize(
    "value",
    ["90", "1:30", "01:60:00", "00:00:00", "-01:30:00", "1:30:00h", "2 hours 30"]
    + [timedelta(0), timedelta(seconds=-1)],
)
def test_an_invalid_duration(value: str | timedelta) -> None:
    with pytest.raises(ValueError, match="a duration in seconds or a string") as info:
        _units.parse_seconds(value, "wall_time")
    assert repr(value) in str(info.value)


def test_a_timedelta_is_no_size() -> None:
    with pytest.raises(TypeError, match="`memory` must be a size"):
        _units.BYTES.parse(timedelta(seconds=1), "memory")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), ("0s", 0), (2.5, 2.5), ("30s", 30), (timedelta(minutes=1), 60), (timedelta(0), 0)],
)
def test_grace_periods(value: str | float | timedelta, expected: float) -> None:
    assert _units.parse_seconds(value, "grace_period", zero=True) == expected


@pytest.mark.parametrize("value", [-1, float("nan"), "5", timedelta(seconds=-1)])
def test_an_invalid_grace_period(value: str | float | timedelta) -> None:
    with pytest.raises(ValueError, match="`grace_period` must be"):
        _units.parse_seconds(value, "grace_period", zero=True)


def test_a_number_without_a_unit_in_text_says_so() -> None:
    with pytest.raises(ValueError, match=r"the number 30 has no unit\."):
        _units.parse_seconds("1h30", "wall_time")
    with pytest.raises(ValueError, match="unknown unit '%'"):
        _units.BYTES.parse("50%", "memory")


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf")])
def test_an_invalid_count(value: float) -> None:
    with pytest.raises(ValueError, match="`n_trials` must be a positive whole number but got"):
        _units.COUNT.parse(value, "n_trials")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["3", True, None])
def test_a_count_of_the_wrong_type(value: object) -> None:
    with pytest.raises(TypeError, match="`n_trials` must be a positive whole number but got"):
        _units.COUNT.parse(value, "n_trials")  # type: ignore[arg-type]


def test_a_plain_number_refuses_text() -> None:
    with pytest.raises(ValueError, match="`cost` must be a positive number but got '3'"):
        _units.NUMBER.parse("3", "cost")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**30 * 1.5, "1.5 GiB"),
        (419430400, "400 MiB"),
        (2 * 2**40, "2 TiB"),
        (3 * 2**50, "3 PiB"),
    ],
)
def test_format_bytes(value: float, expected: str) -> None:
    assert _units.format_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (59.4, "59.4 s"),
        (0.9994, "999 ms"),
        (0.99999, "1 s"),
        (59.999, "60 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (5400, "1 h 30 min"),
        (90000, "1 d 1 h"),
        (86399.9, "1 d"),
        (-61, "-1 min 1 s"),
    ],
)
def test_format_seconds(value: float, expected: str) -> None:
    assert _units.format_seconds(value) == expected


def test_format_joules_and_numbers() -> None:
    assert _units.JOULES.format(7.2e6) == "2 kWh"
    assert _units.JOULES.format(12) == "12 J"
    assert _units.format_number(1234.5) == "1234"  # banker's: half to even
    assert _units.format_number(0.01234) == "0.0123"
    assert _units.format_number(float("inf")) == "inf"
    assert _units.COUNT.format(2000) == "2,000"
    assert _units.COUNT.format(2.5) == "2.5" and _units.COUNT.format(1e20) == "1e+20"


@given(st.floats(min_value=1e-3, max_value=1e18))
def test_compact_sizes_are_read_back_exactly(value: float) -> None:
    assert _units.BYTES.parse(_units.BYTES.compact(value), "memory") == value


@given(st.floats(min_value=1e-3, max_value=1e10))
def test_compact_durations_are_read_back_exactly(value: float) -> None:
    assert _units.parse_seconds(_units.SECONDS.compact(value), "wall_time") == value


@given(st.integers(min_value=1, max_value=2000), st.sampled_from(["MiB", "GiB", "GB"]))
def test_compact_sizes_keep_the_unit_a_person_typed(count: int, unit: str) -> None:
    value = _units.BYTES.parse(f"{count}{unit}", "memory")
    assert isinstance(_units.BYTES.compact(value), str)


@given(st.text(max_size=30))
def test_any_text_is_a_positive_size_or_a_value_error(text: str) -> None:
    try:
        assert _units.BYTES.parse(text, "memory") > 0
    except ValueError as error:
        assert "`memory`" in str(error)


def test_signals_have_a_name() -> None:
    assert _units.format_signal(15) == "SIGTERM"
    assert _units.format_signal(1000) == "signal 1000"
