from __future__ import annotations

import pytest

from optuna_quota.dashboard._notes import bar
from optuna_quota.dashboard._notes import code
from optuna_quota.dashboard._notes import escaped
from optuna_quota.dashboard._notes import table


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
def test_text_is_shown_as_it_is(text: str, shown: str) -> None:
    assert escaped(text) == shown


@pytest.mark.parametrize("address", ["https://e.org", "www.e.org", "me@e.org", "HTTP://e.org"])
def test_an_address_does_not_become_a_link(address: str) -> None:
    assert address not in escaped(f"see {address}")
    assert escaped(address).replace("\u2060", "") == address


def test_long_text_is_cut() -> None:
    assert len(escaped("x" * 10_000)) == 300


def test_a_code_span_holds_backticks_and_stands_in_a_cell() -> None:
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
