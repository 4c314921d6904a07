"""Values are found in what a script prints, whatever else it prints."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optuna_quota._isolation.script_process import (
    find_values,
    LineSplitter,
    MAX_LINE,
    ScriptValue,
)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"step": 3, "value": 0.5}', [ScriptValue(0.5, step=3)]),
        ('  {"step": 3.0, "value": 1, "epoch": 2}\t', [ScriptValue(1.0, step=3)]),
        ('{"value": 2}', [ScriptValue(2.0)]),
        ('{"values": [1, 2.5], "more": {"x": []}}', [ScriptValue([1.0, 2.5])]),
        ('{"value": -Infinity}', [ScriptValue(-math.inf)]),
        ('{"value": 1}{"value": 2}', [ScriptValue(1.0), ScriptValue(2.0)]),
    ],
)
def test_a_line_with_values(line: str, found: list[Any]) -> None:
    assert find_values(line) == found


def test_not_a_number_is_a_value() -> None:
    (found,) = find_values('{"value": NaN}')
    assert found.step is None and math.isnan(found.value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "loss: 0.5",
        "{",
        "{'value': 1}",
        '{"value": 1} and more',
        'loss {"value": 1}',
        '[{"value": 1}]',
        '{"loss": 0.5}',
        '{"value": null}',
        '{"value": "0.5"}',
        '{"value": true}',
        '{"values": []}',
        '{"values": [1, null]}',
        '{"values": 1}',
        '{"step": -1, "value": 0.5}',
        '{"step": 1.5, "value": 0.5}',
        '{"step": "1", "value": 0.5}',
        '{"step": NaN, "value": 0.5}',
        '{"step": 1, "values": [0.5]}',
        '{"value": 1' + 400 * "0" + "}",
        '{"value": ' + 5000 * "9" + "}",
        '{"value": ' + 100_000 * "[",
        "\0\ufffd",
    ],
)
def test_a_line_without_values(line: str) -> None:
    assert find_values(line) == []


def lines_of(*chunks: bytes) -> list[str]:
    splitter = LineSplitter()
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.end()


def test_lines_are_whole_however_they_arrive() -> None:
    text = "é one\ntwo\r\n\nlast".encode()
    expected = ["é one", "two", "", "last"]
    assert lines_of(text) == expected
    assert lines_of(*(text[i : i + 1] for i in range(len(text)))) == expected


def test_bytes_that_are_no_text() -> None:
    assert lines_of(b"\xff\xfe\nx") == ["\ufffd\ufffd", "x"]


def test_a_progress_bar_is_shown_as_it_ended() -> None:
    assert lines_of(b"\r 10%\r 50%\r100%\nnext\n") == ["100%", "next"]


def test_a_line_without_end_is_passed_on_in_pieces() -> None:
    chunk = MAX_LINE * b"x"
    splitter = LineSplitter()
    pieces = [line for _ in range(8) for line in splitter.feed(chunk)]
    assert len(pieces) == 4
    assert sum(map(len, pieces + splitter.end())) == 8 * MAX_LINE
