from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_quota.dashboard._notes import BEGIN
from optuna_quota.dashboard._notes import block_of
from optuna_quota.dashboard._notes import END
from optuna_quota.dashboard._notes import merged


PEOPLE = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=80)


@given(note=PEOPLE)
def test_the_block_goes_below_what_a_person_wrote(note: str) -> None:
    first = merged(note, "one")
    assert first.startswith(note)
    assert block_of(first) == "one"


@given(above=PEOPLE, below=PEOPLE)
def test_renewing_keeps_every_other_character(above: str, below: str) -> None:
    start = merged(above, "one") + below
    renewed = merged(start, "two\n\n| a |")
    assert renewed == merged(above, "two\n\n| a |") + below
    assert merged(renewed, "two\n\n| a |") == renewed


@pytest.mark.parametrize(
    "note",
    [
        f"{BEGIN}\nmine, the end was deleted",
        f"mine, the begin was deleted\n{END}\nmore",
        f"in a sentence {BEGIN} and {END} too",
    ],
)
def test_marks_without_their_partner_are_the_persons_own(note: str) -> None:
    first = merged(note, "one")
    assert first.startswith(note)
    second = merged(first, "two")
    assert second.startswith(note)
    assert block_of(second) == "two" and second.count(END) == first.count(END)


def test_a_copied_block_does_not_pile_up() -> None:
    once = merged("mine", "old")
    twice = f"{once}between\n\n{once.removeprefix('mine')}after"
    renewed = merged(twice, "new")
    assert renewed.count(END) == 1 and "old" not in renewed
    assert renewed.startswith("mine") and "between" in renewed and renewed.endswith("after")


def test_marks_are_link_definitions_that_markdown_does_not_show() -> None:
    for mark in (BEGIN, END):
        assert mark.startswith("[//]: # (") and mark.endswith(")")
        assert ")" not in mark[len("[//]: # (") : -1]
