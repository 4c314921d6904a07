"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import textwrap


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
