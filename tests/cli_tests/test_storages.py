"""The storage and the study that the arguments name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import optuna
import pytest

from optuna_quota.cli.arguments import UsageError
from optuna_quota.cli.storages import load_study, open_storage, without_password


def options(storage: object, name: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(storage=storage and str(storage), study_name=name)


def test_the_only_study_needs_no_name(tuned: str) -> None:
    assert load_study(options(tuned)).study_name == "tuned"
    assert load_study(options(tuned, "tuned")).study_name == "tuned"


def test_the_environment_names_the_storage(tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", tuned)
    assert load_study(options(None)).study_name == "tuned"


def test_one_of_several_studies_of_a_journal(several: Path) -> None:
    assert load_study(options(several, "second")).study_name == "second"


@pytest.mark.parametrize(
    ("name", "says"),
    [(None, "several studies"), ("secnd", "Did you mean 'second'?"), ("other", "first, second")],
)
def test_the_studies_are_listed(several: Path, name: str | None, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_study(options(several, name))
    assert says in str(caught.value)
    assert "first, second" in str(caught.value)


def test_no_sqlite_file_is_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*typo\.db"):
        open_storage(f"sqlite:///{tmp_path}/typo.db")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/empty.db"
    optuna.storages.RDBStorage(url)
    with pytest.raises(UsageError, match="has no study"):
        load_study(options(url))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("journal.log", "neither a file that exists nor a database's URL"),
        (
            "nosuchdatabase://u:secret@host/name",
            "no driver for 'nosuchdatabase://u:***@host/name'",
        ),
        ("postgresql+asyncpg://host/name", "brings postgresql+psycopg2://"),
        ("", "OPTUNA_STORAGE isn't set"),
    ],
)
def test_an_invalid_storage(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    with pytest.raises(UsageError) as caught:
        load_study(options(url))
    assert says in str(caught.value)


def test_a_sqlite_file_needs_a_url(tuned: str) -> None:
    path = tuned.removeprefix("sqlite:///")
    with pytest.raises(UsageError) as caught:
        open_storage(path)
    assert str(caught.value) == f"--storage: {path!r} is an SQLite file; give {tuned!r}."


@pytest.mark.parametrize(
    "content", [b"number,state\n0,1\n", b'{"kind": "x"}\n', b"3\n", b"\xfb\n"]
)
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trials.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"trials\.csv' can't be read as a journal file: "):
        open_storage(str(path))


def test_no_error_shows_a_password() -> None:
    shown = without_password("postgresql+psycopg2://me:s3cret@host/db")
    assert shown == "postgresql+psycopg2://me:***@host/db"
    assert without_password("sqlite:///tuning.db") == "sqlite:///tuning.db"


@pytest.mark.storage
@pytest.mark.parametrize("server", ["POSTGRESQL", "MYSQL", "REDIS"])
def test_a_server(server: str) -> None:
    url = os.environ.get(f"OPTUNA_QUOTA_TEST_{server}_URL")
    if not url:
        pytest.skip(f"OPTUNA_QUOTA_TEST_{server}_URL is not set")
    storage = open_storage(url)
    name = f"cli-{os.getpid()}"
    optuna.create_study(storage=storage, study_name=name)
    try:
        assert load_study(options(url, name)).study_name == name
    finally:
        optuna.delete_study(study_name=name, storage=storage)
