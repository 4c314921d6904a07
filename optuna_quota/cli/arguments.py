"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import difflib
import textwrap
from typing import Any
from typing import TypeVar

from optuna_quota._resources import HELD_RESOURCES
from optuna_quota._resources import LIMIT_RESOURCES
from optuna_quota._resources import Limits
from optuna_quota._resources import PRICED_RESOURCES
from optuna_quota._resources import Quota
from optuna_quota._resources import RESOURCES
from optuna_quota._resources import TOTAL_RESOURCES
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


OK = 0
FAILED = 1
USAGE = 2
OVER_QUOTA = 3
INTERRUPTED = 130


class UsageError(Exception):
    """What was typed can't be meant; the message says what would do."""


_T = TypeVar("_T")

QUOTA_NAMES = TOTAL_RESOURCES + HELD_RESOURCES


def read_quota(typed: Sequence[str], prices: Sequence[str] = ()) -> Quota:
    """Return the quota that ``--quota`` and ``--price`` give.

    Args:
        typed: Each such as ``"wall_time=2h"`` or ``"wall_time=2h,memory=8GiB"``.
        prices: Each such as ``"cpu_time=0.05"``, per hour.

    Raises:
        UsageError: If a name is unknown, or a value is none for it.
    """
    arguments = read_pairs(typed, "--quota", QUOTA_NAMES)
    per_hour = read_pairs(prices, "--price", PRICED_RESOURCES, numbers=True)
    return _build(Quota, "--quota", {**arguments, "prices": per_hour or None})


def read_limits(typed: Sequence[str]) -> Limits:
    """Return the limits that ``--limit`` gives.

    Args:
        typed: Each such as ``"memory=2GiB"``.

    Raises:
        UsageError: If a name is unknown, or a value is none for it.
    """
    return _build(Limits, "--limit", read_pairs(typed, "--limit", LIMIT_RESOURCES))


def read_usage(typed: str) -> Usage:
    """Return the usage of every trial that ``--footprint`` states.

    Args:
        typed: Such as ``"memory=2GiB,wall_time=90s"``.

    Raises:
        UsageError: If a name is unknown, or a value is none for it.
    """
    return _build(Usage, "--footprint", read_pairs([typed], "--footprint", USAGE_RESOURCES))


def read_pairs(
    typed: Sequence[str], option: str, known: Sequence[str], *, numbers: bool = False
) -> dict[str, Any]:
    """Return values by name: text where the resource has units, else a number.

    Args:
        typed: ``NAME=VALUE``, each one or several with commas between.
        option: What it was typed after; it stands in the error.
        known: Names that there are.
        numbers: Whether every value is a number.

    Raises:
        UsageError: If a part is no pair, comes twice, or its name is unknown.
    """
    pairs: dict[str, Any] = {}
    for part in _parts(typed):
        name, _, text = (side.strip() for side in part.partition("="))
        if not name or not text:
            raise UsageError(f"{option} must be NAME=VALUE, such as memory=8GiB, got {part!r}.")
        if name not in known:
            raise UsageError(f"{option} knows no {name!r}; {_hint(name, known)}")
        if name in pairs:
            raise UsageError(f"{option} {name} is given twice.")
        unitless = numbers or not RESOURCES[name].unit.symbol
        pairs[name] = _number(text, f"{option} {name}") if unitless else text
    return pairs


def _parts(typed: Iterable[str]) -> Iterable[str]:
    return (part for text in typed for part in text.split(","))


def _number(text: str, name: str) -> float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UsageError(f"{name} must be a number but got {text!r}.") from None


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
    return f"did you mean {close[0]}?" if close else f"it knows {', '.join(known)}."


def _build(kind: type[_T], option: str, arguments: Mapping[str, Any]) -> _T:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error


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
        name: What is typed.
        summary: One sentence; its first line stands in the list of commands.
        examples: Lines to copy.
        keys: What ``--format json`` prints, by key.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{textwrap.indent(examples.strip(), '  ')}\n\n{_explain(keys)}",
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


def _explain(keys: Mapping[str, str]) -> str:
    lines = ["JSON keys (amounts in bytes, seconds and joules; what is unknown is null):"]
    for key, meaning in keys.items():
        lines += textwrap.wrap(
            meaning, 80, initial_indent=f"  {key:<16}", subsequent_indent=" " * 18
        )
    return "\n".join(lines)


def add_quota_argument(parser: argparse.ArgumentParser, use: str) -> None:
    """Add ``--quota``.

    Args:
        parser: Where to add it.
        use: What the command does with it.
    """
    parser.add_argument(
        "--quota",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help=f"{use}n_trials, wall_time, trial_time, cpu_time, gpu_time, energy and cost in all; "
        "memory, gpu_memory and cpu_cores at one moment. Sizes and times have units: 8GiB, 2h, "
        "1h30min",
    )


def add_price_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--price``."""
    parser.add_argument(
        "--price",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="what an hour of cpu_time, gpu_time or trial_time costs, for --quota cost=…",
    )


def add_limit_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--limit``."""
    parser.add_argument(
        "--limit",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a ceiling on each trial, may be repeated: memory, wall_time, cpu_time, cpu_cores, "
        "gpu_memory, gpu_time",
    )


def read_count(text: str) -> int:
    """Return a positive whole number.

    Args:
        text: As it was typed.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number but got {text!r}")
    return int(text)
