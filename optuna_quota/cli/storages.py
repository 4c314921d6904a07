"""Opens the storage and the study that ``--storage`` and ``--study-name`` name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import re
from typing import TYPE_CHECKING

from optuna_quota.cli.arguments import suggestion, UsageError


if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study


_SQLITE_FILE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
_SQLITE_HEADER = b"SQLite format 3\0"
_PASSWORD = re.compile(r"(//[^/@:]*:)[^@]*@")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--storage`` and ``--study-name``, as Optuna's own command line has them."""
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="a database URL (sqlite:///tuning.db, postgresql+psycopg2://…, mysql+pymysql://…), "
        "redis://… or a journal file; default: the environment variable OPTUNA_STORAGE",
    )
    parser.add_argument(
        "--study-name", metavar="NAME", help="may be left out where the storage has one study"
    )


def load_study(options: argparse.Namespace) -> Study:
    """Return the study that the arguments or the environment name.

    Raises:
        UsageError: If there is no such storage or study, or none is named and there are several.
    """
    import optuna

    url = options.storage or os.environ.get("OPTUNA_STORAGE")
    if not url:
        raise UsageError("--storage is missing, and OPTUNA_STORAGE isn't set.")
    storage = open_storage(str(url))
    names = optuna.study.get_all_study_names(storage)
    return optuna.load_study(study_name=_choose(names, options.study_name), storage=storage)


def open_storage(url: str) -> BaseStorage:
    """Return a storage, as Optuna's own command line does, but create no SQLite file.

    Args:
        url: A database URL, a Redis URL, or the path of a journal file.

    Raises:
        UsageError: If there is no such storage.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalRedisBackend

    if url.startswith("redis"):
        return JournalStorage(JournalRedisBackend(url))
    if os.path.isfile(url):
        return _open_file(url)
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
