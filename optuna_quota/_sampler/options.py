"""The options of QuotaSampler, and what is said of wrong ones."""

from __future__ import annotations

from typing import Any
from typing import get_args
from typing import Literal


OnExhausted = Literal["stop", "raise"]
OnCrowded = Literal["wait", "smaller"]
OnProjected = Literal["continue", "stop", "raise"]


def check_kinds(**given: tuple[Any, type]) -> None:
    """Raise where an option is neither None nor of its kind.

    Args:
        given: Value and kind by the option's name.

    Raises:
        TypeError: If one is of another kind.
    """
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__} or None but got {value!r}.")


def check_choices(**given: tuple[Any, Any]) -> None:
    """Raise where an option is none of its choices.

    Args:
        given: Value and ``Literal`` by the option's name.

    Raises:
        ValueError: If one is something else.
    """
    for name, (value, literal) in given.items():
        choices = get_args(literal)
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"`{name}` must be one of {listed} but got {value!r}.")


def check_shares(breach_probability: float, audits: float | None) -> None:
    """Raise where a probability or a share is out of its range.

    Raises:
        ValueError: If one is.
    """
    if not 0 < breach_probability <= 1:
        raise ValueError(
            f"`breach_probability` must be above 0 and at most 1 but got {breach_probability!r}."
        )
    if audits is not None and not 0 <= audits <= 1:
        raise ValueError(f"`audits` must be a share from 0 to 1 but got {audits!r}.")
