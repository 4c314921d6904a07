"""The command of a script: a template that is filled with a trial's parameters. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import re
import shlex
from typing import Any


# A name with an optional format, in braces. Other braces, as in JSON or in code, stay as they are,
# and so do a shell's variables, `${name}`.
_NAME = r"([^\W\d][\w./-]*)(?::([^{}\s]*))?"
_FIELD = re.compile(rf"\{{(\{{{_NAME}\}})\}}|(?<!\$)\{{{_NAME}\}}")


class CommandTemplate:
    """A command whose words have ``{name}`` in place of parameters.

    It is split before it is filled, so that a value with spaces or quotes stays in one word.

    Args:
        command: A string, split as a POSIX shell would, or its words.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is empty, or its quotes don't match.
    """

    def __init__(self, command: str | Sequence[str | os.PathLike[str]]) -> None:
        self._words = _split(command)
        if not self._words or not self._words[0]:
            raise ValueError(f"`command` must begin with a program but got {command!r}.")

    @property
    def program(self) -> str | None:
        """The program; None where that depends on the parameters."""
        return None if _FIELD.search(self._words[0]) else self._words[0]

    def fill(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words with the values in their places.

        Raises:
            ValueError: If a value is missing or does not suit its format.
        """
        return [_FIELD.sub(lambda field: _fill(field, values), word) for word in self._words]

    def __repr__(self) -> str:
        return repr(shlex.join(self._words))


def _split(command: Any) -> list[str]:
    if isinstance(command, str):
        try:
            return shlex.split(command)
        except ValueError as error:
            raise ValueError(f"`command` can't be split: {error}, in {command!r}.") from None
    if isinstance(command, Sequence) and not isinstance(command, (bytes, bytearray)):
        words = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in command]
        if all(isinstance(word, str) for word in words):
            return words
    raise TypeError(f"`command` must be a string or a sequence of strings but got {command!r}.")


def _fill(field: re.Match[str], values: Mapping[str, Any]) -> str:
    doubled, _, _, name, spec = field.groups()
    if doubled is not None:
        return str(doubled)
    if name not in values:
        known = ", ".join(map(repr, values)) or "nothing"
        raise ValueError(
            f"`command` has {field[0]} but `params` returned {known}. Write {{{field[0]}}} where "
            "it is no parameter."
        )
    try:
        return format(values[name], spec or "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field[0]} can't format {values[name]!r}: {error}.") from error
