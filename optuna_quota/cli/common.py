"""What the commands share: arguments, what they name, exit statuses, tables and JSON."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
import difflib
import inspect
import json
import math
import os
from pathlib import Path
import re
import sys
import textwrap
from types import ModuleType
from typing import Any, TYPE_CHECKING, TypeVar

from optuna_quota import _resources
from optuna_quota._limits import Limits, Quota
from optuna_quota._units import align
from optuna_quota._usage import Usage


if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    import pandas as pd

    from optuna_quota._footprint.footprint import Footprint


OK = 0
FAILED = 1
USAGE = 2
OVER_QUOTA = 3
INTERRUPTED = 130

_SQLITE_FILE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
_SQLITE_HEADER = b"SQLite format 3\0"
_PASSWORD = re.compile(r"(//[^/@:]*:)[^@]*@")

_T = TypeVar("_T")


class UsageError(Exception):
    """Invalid arguments; the message says what is valid."""


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: ModuleType
) -> None:
    """Add a subcommand that can print a table or JSON: a module of its name.

    Its docstring has one sentence and examples to copy, ``KEYS`` the keys of its JSON with their
    meaning; ``add_arguments`` adds arguments, and ``run`` returns the exit status.
    """
    summary, _, examples = doc_of(command).partition("\n\n")
    summary = " ".join(summary.split())
    lines = ["JSON keys (amounts in bytes, seconds and joules; unknown values are null):"]
    for key, meaning in command.KEYS.items():
        lines += textwrap.wrap(
            meaning, 80, initial_indent=f"  {key:<16}", subsequent_indent=" " * 18
        )
    parser = commands.add_parser(
        name_of(command),
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
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def doc_of(module: ModuleType) -> str:
    """Return the docstring of a module, which ``python -OO`` leaves out, from its source."""
    source = "" if module.__doc__ else inspect.getsource(module)
    return module.__doc__ or ast.get_docstring(ast.parse(source), clean=False) or ""


def name_of(command: ModuleType) -> str:
    return command.__name__.rpartition(".")[2]


def add_quota_arguments(
    parser: argparse.ArgumentParser, purpose: str, *, limits: bool = False
) -> None:
    """Add ``--quota`` and ``--price``, and ``--limit`` if asked for."""
    options = {
        "--quota": f"{purpose}: n_trials, wall_time, trial_time, cpu_time, gpu_time, energy and "
        "cost in total; memory, gpu_memory and cpu_cores at one moment. Sizes and times have "
        "units: 8GiB, 2h, 1h30min",
        "--price": "what an hour of cpu_time, gpu_time or trial_time costs, for --quota cost=…",
    }
    if limits:
        options["--limit"] = (
            "a ceiling on each trial, may be repeated: memory, wall_time, cpu_time, cpu_cores, "
            "gpu_memory, gpu_time"
        )
    for option, text in options.items():
        parser.add_argument(option, metavar="NAME=VALUE", action="append", default=[], help=text)


def add_size_arguments(parser: argparse.ArgumentParser, text: str, *, required: bool) -> None:
    """Add ``--n-trials`` and ``--n-jobs``."""
    parser.add_argument("--n-trials", metavar="N", type=_parse_count, required=required, help=text)
    text = "how many at once (default: 1)"
    parser.add_argument("--n-jobs", metavar="N", type=_parse_count, default=1, help=text)


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number but got {text!r}")
    return int(text)


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--storage`` and ``--study-name``, as Optuna's own command line has them."""
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="a database URL (sqlite:///tuning.db, postgresql+psycopg2://…, mysql+pymysql://…), "
        "redis://… or a journal file; default: the environment variable OPTUNA_STORAGE",
    )
    parser.add_argument(
        "--study-name", metavar="NAME", help="optional if the storage has only one study"
    )


def parse_quota(options: argparse.Namespace) -> Quota:
    """Return the quota of ``--quota`` and ``--price``."""
    amounts = _parse_pairs(
        options.quota, "--quota", _resources.TOTAL_RESOURCES + _resources.HELD_RESOURCES
    )
    prices = _parse_pairs(options.price, "--price", _resources.PRICED_RESOURCES)
    return _build(Quota, "--quota", {**amounts, "prices": prices or None})


def parse_limits(options: argparse.Namespace) -> Limits:
    """Return the limits of ``--limit``."""
    return _build(
        Limits, "--limit", _parse_pairs(options.limit, "--limit", _resources.LIMIT_RESOURCES)
    )


def parse_footprint(text: str) -> Usage | Footprint:
    """Return the footprint of ``--footprint``.

    Args:
        text: Such as ``"memory=2GiB,wall_time=90s"``, or the path of a file that
            ``Footprint.to_json`` or ``report --footprint`` wrote.
    """
    if "=" in text and not Path(text).is_file():
        return _build(
            Usage, "--footprint", _parse_pairs([text], "--footprint", _resources.USAGE_RESOURCES)
        )
    from optuna_quota._footprint.footprint import Footprint

    try:
        return Footprint.from_json(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--footprint: {error}") from error


def suggestion(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that was probably meant."""
    close = difflib.get_close_matches(name, known, 1)
    return close[0] if close else None


def _parse_pairs(texts: Sequence[str], option: str, known: Sequence[str]) -> dict[str, Any]:
    """Return values by name: numbers where there are no units, text elsewhere.

    Each text is one ``NAME=VALUE`` or several separated by commas.
    """
    pairs: dict[str, Any] = {}
    for part in ",".join(texts).split(",") if texts else ():
        name, _, value = (side.strip() for side in part.partition("="))
        if not name or not value:
            raise UsageError(f"{option} must be NAME=VALUE, such as memory=8GiB, got {part!r}.")
        if name not in known:
            meant = suggestion(name.lower().replace("-", "_"), known)
            hint = f"did you mean {meant}?" if meant else f"valid names are {', '.join(known)}."
            raise UsageError(f"{option}: unknown name {name!r}; {hint}")
        if name in pairs:
            raise UsageError(f"{option} {name} is given twice.")
        if option == "--price" or not _resources.RESOURCES[name].unit.symbol:
            try:
                pairs[name] = int(value) if value.isdigit() else float(value)
            except ValueError:
                raise UsageError(f"{option} {name} must be a number but got {value!r}.") from None
        else:
            pairs[name] = value
    return pairs


def _build(kind: type[_T], option: str, arguments: Mapping[str, Any]) -> _T:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error


def load_study(options: argparse.Namespace) -> Study:
    """Return the study that the arguments or the environment name; the only one if none is."""
    import optuna

    url = options.storage or os.environ.get("OPTUNA_STORAGE")
    if not url:
        raise UsageError("--storage is missing, and OPTUNA_STORAGE isn't set.")
    storage = open_storage(str(url))
    names = optuna.study.get_all_study_names(storage)
    return optuna.load_study(study_name=_choose(names, options.study_name), storage=storage)


def open_storage(url: str) -> BaseStorage:
    """Return a storage, as Optuna's own command line does, but create no SQLite file."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalRedisBackend

    if os.path.isfile(url):
        return _open_file(url)
    if url.startswith("redis"):
        return JournalStorage(JournalRedisBackend(url))
    return _open_database(url)


def _open_file(path: str) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with open(path, "rb") as file:
        if file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER:
            raise UsageError(f"--storage: {path!r} is an SQLite file; give 'sqlite:///{path}'.")
    try:
        return JournalStorage(JournalFileBackend(path))
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--storage: {path!r} can't be read as a journal file: {error!r}."
        ) from error


def _open_database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

    sqlite = _SQLITE_FILE.fullmatch(url)
    if sqlite and sqlite["path"] != ":memory:" and not Path(sqlite["path"]).is_file():
        raise UsageError(f"--storage: there is no file {sqlite['path']!r}.")
    try:
        return RDBStorage(url)
    except (NoSuchModuleError, ImportError) as error:
        raise UsageError(
            f"--storage: there is no driver for {without_password(url)!r}. Name one in the URL: "
            "'optuna-quota[storages]' brings postgresql+psycopg2:// and mysql+pymysql://."
        ) from error
    except ArgumentError as error:
        raise UsageError(
            f"--storage: {without_password(url)!r} is neither a file that exists nor a "
            "database's URL."
        ) from error
    except DBAPIError as error:
        first = str(error.orig).strip().splitlines()[0]
        raise ConnectionError(f"The storage doesn't answer: {first}") from error


def without_password(url: str) -> str:
    """Return a URL with its password hidden."""
    return _PASSWORD.sub(r"\1***@", url)


def _choose(names: list[str], asked: str | None) -> str:
    if asked in names:
        return str(asked)
    if not names:
        raise UsageError("The storage has no study.")
    listed = ", ".join(sorted(names)[:20]) + (" and others" if len(names) > 20 else "")
    if asked is not None:
        close = suggestion(asked, names)
        meant = f" Did you mean {close!r}?" if close else ""
        raise UsageError(f"The storage has no study {asked!r}. It has: {listed}.{meant}")
    if len(names) > 1:
        raise UsageError(f"The storage has several studies; give --study-name: {listed}.")
    return names[0]


_STYLES = {"bold": "1", "dim": "2", "green": "32", "yellow": "33", "red": "31"}
# The escape sequences that `styled` writes, and no others.
_STYLE = re.compile(r"(\x1b\[(?:0|[12]|3[123])m)")


def write_line(text: str = "") -> None:
    """Print text to standard output without control characters, except line ends and styles."""
    parts = _STYLE.split(text) if has_colour() else [text]
    parts[::2] = map(harmless, parts[::2])
    print("".join(parts))


def harmless(text: str) -> str:
    """Replace characters that could control a terminal: names come from the storage."""
    return "".join(c if c.isprintable() or c in "\n\u2002" else " " for c in text)


def write_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity are null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a scalar of numpy's
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)


def as_json(found: Any, keys: Iterable[str], **computed: Any) -> dict[str, Any]:
    """Return the values of a command's documented keys: computed, or else attributes."""
    return {key: computed[key] if key in computed else getattr(found, key) for key in keys}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a DataFrame by column."""
    found: list[dict[str, Any]] = frame.astype(object).to_dict("records")
    return found


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done on standard error, where that is a terminal, until it is done.

    The function that is yielded shows what is done next.
    """

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    show(f"{text} …")
    try:
        yield lambda text: show(f"{text} …")
    finally:
        show("")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first column has names, the others figures."""
    first, *rest = align([header, *rows])
    rule = ("─" if encodes("─") else "-") * max(map(len, (first, *rest)))
    return [styled(first, "bold"), styled(rule, "dim"), *rest]


def styled(text: str, style: str) -> str:
    """Return the text in a style where standard output is a colour terminal."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if has_colour() else text


def has_colour() -> bool:
    """Return whether to colour: on a terminal, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def encodes(text: str) -> bool:
    """Return whether standard output can show the text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
