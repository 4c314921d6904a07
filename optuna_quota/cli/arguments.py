"""Arguments that several commands share, how they are parsed, and the exit statuses."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import difflib
from pathlib import Path
import textwrap
from typing import Any, TYPE_CHECKING, TypeVar

from optuna_quota._resources import (
    HELD_RESOURCES,
    LIMIT_RESOURCES,
    Limits,
    PRICED_RESOURCES,
    Quota,
    RESOURCES,
    TOTAL_RESOURCES,
    Usage,
    USAGE_RESOURCES,
)


if TYPE_CHECKING:
    from optuna_quota._footprint.footprint import Footprint


OK = 0
FAILED = 1
USAGE = 2
OVER_QUOTA = 3
INTERRUPTED = 130

_T = TypeVar("_T")


class UsageError(Exception):
    """Invalid arguments; the message says what is valid."""


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    *,
    examples: str,
    keys: Mapping[str, str],
) -> argparse.ArgumentParser:
    """Add a subcommand that can print a table or JSON, and return its parser.

    Args:
        commands: Where to add it.
        name: Its name.
        summary: One sentence, for the list of commands.
        examples: Lines to copy.
        keys: The keys of its JSON, with their meaning.
    """
    lines = ["JSON keys (amounts in bytes, seconds and joules; unknown values are null):"]
    for key, meaning in keys.items():
        lines += textwrap.wrap(
            meaning, 80, initial_indent=f"  {key:<16}", subsequent_indent=" " * 18
        )
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="\n".join(["examples:", textwrap.indent(examples, "  "), *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="a table for people, or JSON with stable keys (default: table)",
    )
    return parser


def add_quota_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add ``--quota`` and ``--price``."""
    _add_repeatable(
        parser,
        "--quota",
        f"{purpose}: n_trials, wall_time, trial_time, cpu_time, gpu_time, energy and cost in "
        "total; memory, gpu_memory and cpu_cores at one moment. Sizes and times have units: 8GiB, "
        "2h, 1h30min",
    )
    _add_repeatable(
        parser,
        "--price",
        "what an hour of cpu_time, gpu_time or trial_time costs, for --quota cost=…",
    )


def add_limit_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--limit``."""
    _add_repeatable(
        parser,
        "--limit",
        "a ceiling on each trial, may be repeated: memory, wall_time, cpu_time, cpu_cores, "
        "gpu_memory, gpu_time",
    )


def _add_repeatable(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, metavar="NAME=VALUE", action="append", default=[], help=text)


def add_size_arguments(parser: argparse.ArgumentParser, text: str, *, required: bool) -> None:
    """Add ``--n-trials`` and ``--n-jobs``."""
    parser.add_argument("--n-trials", metavar="N", type=_parse_count, required=required, help=text)
    parser.add_argument(
        "--n-jobs",
        metavar="N",
        type=_parse_count,
        default=1,
        help="how many at once (default: 1)",
    )


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number but got {text!r}")
    return int(text)


def parse_quota(options: argparse.Namespace) -> Quota:
    """Return the quota of ``--quota`` and ``--price``.

    Raises:
        UsageError: If a name is unknown or a value invalid.
    """
    amounts = _parse_pairs(options.quota, "--quota", TOTAL_RESOURCES + HELD_RESOURCES)
    prices = _parse_pairs(options.price, "--price", PRICED_RESOURCES, numbers=True)
    return _build(Quota, "--quota", {**amounts, "prices": prices or None})


def parse_limits(options: argparse.Namespace) -> Limits:
    """Return the limits of ``--limit``.

    Raises:
        UsageError: If a name is unknown or a value invalid.
    """
    return _build(Limits, "--limit", _parse_pairs(options.limit, "--limit", LIMIT_RESOURCES))


def parse_footprint(text: str) -> Usage | Footprint:
    """Return the footprint of ``--footprint``.

    Args:
        text: Such as ``"memory=2GiB,wall_time=90s"``, or the path of a file that
            ``Footprint.to_json`` or ``report --footprint`` wrote.

    Raises:
        UsageError: If it is neither.
    """
    if "=" in text and not Path(text).is_file():
        return _build(Usage, "--footprint", _parse_pairs([text], "--footprint", USAGE_RESOURCES))
    from optuna_quota._footprint.footprint import Footprint

    try:
        return Footprint.from_json(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--footprint: {error}") from error


def suggestion(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that was probably meant."""
    close = difflib.get_close_matches(name, known, 1)
    return close[0] if close else None


def _parse_pairs(
    texts: Sequence[str], option: str, known: Sequence[str], *, numbers: bool = False
) -> dict[str, Any]:
    """Return values by name: text where the resource has units, else a number.

    Args:
        texts: ``NAME=VALUE``, each one or several separated by commas.
        option: The option, for errors.
        known: Valid names.
        numbers: Whether every value is a number.
    """
    pairs: dict[str, Any] = {}
    for part in (part for text in texts for part in text.split(",")):
        name, _, value = (side.strip() for side in part.partition("="))
        if not name or not value:
            raise UsageError(f"{option} must be NAME=VALUE, such as memory=8GiB, got {part!r}.")
        if name not in known:
            meant = suggestion(name.lower().replace("-", "_"), known)
            hint = f"did you mean {meant}?" if meant else f"valid names are {', '.join(known)}."
            raise UsageError(f"{option}: unknown name {name!r}; {hint}")
        if name in pairs:
            raise UsageError(f"{option} {name} is given twice.")
        unitless = numbers or not RESOURCES[name].unit.symbol
        pairs[name] = _parse_number(value, f"{option} {name}") if unitless else value
    return pairs


def _parse_number(text: str, name: str) -> float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError(f"{name} must be a number but got {text!r}.") from None


def _build(kind: type[_T], option: str, arguments: Mapping[str, Any]) -> _T:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error
