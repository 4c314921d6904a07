"""Commands: split as a shell does, filled with a trial's parameters, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_quota._isolation.script_command import CommandTemplate


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --lr {lr}", ["train", "--lr", "0.5"]),
        (["train", "--lr={lr}"], ["train", "--lr=0.5"]),
        ([Path("train.sh"), "{text}"], ["train.sh", "a b'c"]),
        ("train '{text}' x{text}y", ["train", "a b'c", "xa b'cy"]),
        ("train 'two words' {n:03d} {lr:.2e}", ["train", "two words", "007", "5.00e-01"]),
        ("train {model.width}", ["train", "64"]),
        ("train {{lr}} ${lr} {} {1}", ["train", "{lr}", "${lr}", "{}", "{1}"]),
        (["sh", "-c", """echo '{"value": 1}' {n}"""], ["sh", "-c", """echo '{"value": 1}' 7"""]),
    ],
)
def test_words(command: Any, words: list[str]) -> None:
    values = {"lr": 0.5, "text": "a b'c", "n": 7, "model.width": 64}
    assert CommandTemplate(command).fill(values) == words


def test_the_program_is_known_unless_it_depends_on_the_parameters() -> None:
    assert CommandTemplate("python train.py {x}").program == "python"
    assert CommandTemplate("./{model} {x}").program is None


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        ("", ValueError, "must begin with a program"),
        ([], ValueError, "must begin with a program"),
        (["", "x"], ValueError, "must begin with a program"),
        ("train 'x", ValueError, "No closing quotation"),
        (b"train", TypeError, "must be a string or a sequence of strings"),
        (["train", 3], TypeError, "must be a string or a sequence of strings"),
        (None, TypeError, "must be a string or a sequence of strings"),
    ],
)
def test_what_is_no_command(command: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        CommandTemplate(command)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train {lrr}", r"has {lrr} but `params` returned 'lr'. Write {{lrr}} where"),
        ("train {lr:d}", "{lr:d} can't format 0.5: Unknown format code 'd'"),
    ],
)
def test_a_parameter_that_can_not_be_filled_in(command: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        CommandTemplate(command).fill({"lr": 0.5})
    assert text in str(caught.value)
