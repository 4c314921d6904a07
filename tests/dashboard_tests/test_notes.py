"""The block in a note, and Markdown of text from a storage."""

from __future__ import annotations

from hypothesis import given, strategies as st
import pytest

from optuna_quota import analyze
from optuna_quota.dashboard import (
    bar,
    BEGIN,
    code,
    END,
    escape,
    replace_block,
    study_note,
    table,
)
from optuna_quota.visualization._report_text import ReportText
from tests.dashboard_tests.notes import block_of
from tests.utilization_tests.test_formula import flawed_study


PEOPLE = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=80)


@given(note=PEOPLE)
def test_the_block_is_appended_to_a_persons_text(note: str) -> None:
    first = replace_block(note, "one")
    assert first.startswith(note)
    assert block_of(first) == "one"


@given(above=PEOPLE, below=PEOPLE)
def test_replacing_the_block_keeps_all_other_text(above: str, below: str) -> None:
    start = replace_block(above, "one") + below
    replaced = replace_block(start, "two\n\n| a |")
    assert replaced == replace_block(above, "two\n\n| a |") + below
    assert replace_block(replaced, "two\n\n| a |") == replaced


@pytest.mark.parametrize(
    "note",
    [
        f"{BEGIN}\nmine, the end was deleted",
        f"mine, the begin was deleted\n{END}\nmore",
        f"in a sentence {BEGIN} and {END} too",
    ],
)
def test_single_marks_belong_to_the_persons_text(note: str) -> None:
    first = replace_block(note, "one")
    assert first.startswith(note)
    second = replace_block(first, "two")
    assert second.startswith(note)
    assert block_of(second) == "two" and second.count(END) == first.count(END)


def test_copies_of_the_block_are_removed() -> None:
    once = replace_block("mine", "old")
    twice = f"{once}between\n\n{once.removeprefix('mine')}after"
    replaced = replace_block(twice, "new")
    assert replaced.count(END) == 1 and "old" not in replaced
    assert replaced.startswith("mine") and "between" in replaced and replaced.endswith("after")


def test_marks_are_link_definitions() -> None:
    for mark in (BEGIN, END):
        assert mark.startswith("[//]: # (") and mark.endswith(")")
        assert ")" not in mark[len("[//]: # (") : -1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1 GiB, 45% at 3:00", "1 GiB, 45% at 3:00"),
        ("<script>", r"\<script\>"),
        ("![x](y)", r"\!\[x\](y)"),
        ("a|b", r"a\|b"),
        ("**b** _i_ `c` ~s~", r"\*\*b\*\* \_i\_ \`c\` \~s\~"),
        ("# h", r"\# h"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("two\nlines\r\x00", "two lines  "),
        ("&lt;", r"\&lt;"),
        ("\u202egnp", " gnp"),
    ],
)
def test_text_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize("address", ["https://e.org", "www.e.org", "me@e.org", "HTTP://e.org"])
def test_an_address_does_not_become_a_link(address: str) -> None:
    assert address not in escape(f"see {address}")
    assert escape(address).replace("\u2060", "") == address


def test_long_text_is_cut() -> None:
    assert len(escape("x" * 10_000)) == 300


def test_a_code_span_holds_backticks_and_fits_a_cell() -> None:
    assert code("a · b") == "`a · b`"
    assert code("a`b|c") == "`` a`b\\|c ``"


def test_a_table_aligns_its_numbers() -> None:
    lines = table(["a", "n"], [["x", "1"]], right=(1,)).split("\n")
    assert lines[1] == "| :--- | ---: |"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["x", "1"]


@pytest.mark.parametrize(("share", "filled"), [(0, 0), (0.5, 10), (1, 20), (7.3, 20)])
def test_a_bar_is_full_at_most(share: float, filled: int) -> None:
    assert bar(share).count("█") == filled
    assert bar(share).endswith(f"{100 * share:.0f}%")


def test_only_formulas_are_set_as_code() -> None:
    for change, line in (
        ("twins", "- `memory = "),
        ("bend", "- memory follows no floor plus power"),
    ):
        study = flawed_study(change)
        note = study_note(ReportText(analyze(study)), "")
        assert f"#### Fitted models\n\n{line}" in note
