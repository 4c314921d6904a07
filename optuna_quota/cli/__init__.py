"""Keeps Optuna studies inside their computing-resource quotas.

exit status:
  0  it fits, or there was nothing to decide
  1  an error, explained on stderr
  2  invalid arguments
  3  a projection does not fit, or a quota is exceeded

`optuna-quota COMMAND --help` explains each command with examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import io
import os
import sys
import textwrap
import warnings

from optuna_quota._version import __version__
from optuna_quota.cli import doctor, project, replay, report, status
from optuna_quota.cli.common import (
    add_command,
    doc_of,
    FAILED,
    harmless,
    INTERRUPTED,
    name_of,
    OK,
    suggestion,
    USAGE,
    UsageError,
)


_COMMANDS = (project, report, replay, status, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The arguments without the program's name; ``sys.argv`` by default.
    """
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks becomes a question mark, not an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = build_parser()
    _check_command(parser, sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)
    if options.debug:
        return _run(options)
    try:
        return _run(options)
    except UsageError as error:
        return _print_error(options, error, USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe; flushing at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:  # noqa: BLE001 - a sentence instead of a traceback
        return _print_error(options, error, FAILED)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    summary, _, epilog = doc_of(sys.modules[__name__]).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="optuna-quota",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"optuna-quota {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        add_command(commands, command)
    return parser


def _check_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Exit with the command that was probably meant if an unknown one is given."""
    names = [name_of(command) for command in _COMMANDS]
    given = next((each for each in arguments if not each.startswith("-")), None)
    if given is not None and given not in names:
        meant = suggestion(given.lower(), names)
        hint = f"did you mean {meant}?" if meant else f"valid commands are {', '.join(names)}."
        parser.error(f"unknown command {given!r}; {hint}")


def _run(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        if not options.debug:
            warnings.simplefilter("ignore")
        status: int = options.run(options)
    sys.stdout.flush()
    return status


def _print_error(options: argparse.Namespace, error: Exception, status: int) -> int:
    text = " ".join(harmless(str(error)).split()) or type(error).__name__
    message = f"optuna-quota {options.command}: {text}"
    print(
        "\n".join(textwrap.wrap(message, 99, break_long_words=False, break_on_hyphens=False)),
        file=sys.stderr,
    )
    return status
