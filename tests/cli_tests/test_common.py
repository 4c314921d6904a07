"""Parsing of quotas, limits and footprints; the storage and the study that arguments name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
import os
from pathlib import Path
from typing import Any

from hypothesis import given, strategies as st
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
import pytest

from optuna_quota import Limits, Quota, Usage
from optuna_quota.cli.common import (
    load_study,
    open_storage,
    parse_footprint,
    parse_limits,
    parse_quota,
    UsageError,
    without_password,
)


def quota(texts: Sequence[str], prices: Sequence[str] = ()) -> Quota:
    return parse_quota(Namespace(quota=texts, price=prices))


def limits(*texts: str) -> Limits:
    return parse_limits(Namespace(limit=texts))


@pytest.mark.parametrize(
    ("parse", "expected"),
    [
        (lambda: quota(["wall_time=2h", "memory=8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: quota(["wall_time=2h, memory = 8GiB"]), Quota(wall_time=7200, memory=2**33)),
        (lambda: quota(["n_trials=100", "cpu_cores=4"]), Quota(n_trials=100, cpu_cores=4)),
        (lambda: quota(["energy=2kWh"]), Quota(energy=7.2e6)),
        (
            lambda: quota(["cost=10"], ["cpu_time=0.05"]),
            Quota(cost=10, prices={"cpu_time": 0.05}),
        ),
        (lambda: quota(["memory=4G", "wall_time=01:30:00"]), Quota(memory=4e9, wall_time=5400)),
        (
            lambda: limits("wall_time=2 hours", "cpu_time=1h30m"),
            Limits(wall_time=7200, cpu_time=5400),
        ),
        (lambda: quota([]), Quota()),
        (
            lambda: limits("memory=2GiB", "cpu_cores=1.5"),
            Limits(memory=2**31, cpu_cores=1.5),
        ),
        (lambda: parse_footprint("memory=2GiB,wall_time=90s"), Usage(memory=2**31, wall_time=90)),
    ],
)
def test_valid_arguments(parse: Callable[[], Any], expected: Any) -> None:
    assert parse() == expected


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (lambda: quota(["memory"]), "NAME=VALUE"),
        (lambda: quota(["=8GiB"]), "NAME=VALUE"),
        (lambda: quota(["memory="]), "NAME=VALUE"),
        (lambda: quota([""]), "NAME=VALUE"),
        (lambda: quota(["memory=8"]), "has no unit"),
        (lambda: quota(["memory=8GiBs"]), "unknown unit"),
        (lambda: quota(["memory=-8GiB"]), "positive"),
        (lambda: quota(["wall-time=2h"]), "did you mean wall_time?"),
        (lambda: quota(["xyzzy=2h"]), "valid names are n_trials"),
        (lambda: quota(["memory=1GiB", "memory=2GiB"]), "given twice"),
        (lambda: quota(["n_trials=ten"]), "must be a number"),
        (lambda: quota(["n_trials=1.5"]), "whole number"),
        (lambda: quota(["cpu_cores=nan"]), "finite"),
        (lambda: quota(["cost=10"]), "`prices`"),
        (lambda: quota([], ["cpu_time=1"]), "`cost`"),
        (lambda: quota(["cost=10"], ["memory=1"]), "--price: unknown name 'memory'"),
        (lambda: limits("n_trials=3"), "--limit: unknown name 'n_trials'"),
        (lambda: parse_footprint("cpu_cores=3"), "--footprint: unknown name 'cpu_cores'"),
    ],
)
def test_invalid_arguments(parse: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse()
    assert message in str(caught.value)
    assert "?." not in str(caught.value)


@given(st.lists(st.text(max_size=40), max_size=3), st.lists(st.text(max_size=20), max_size=2))
def test_any_text_is_a_quota_or_a_usage_error(texts: list[str], prices: list[str]) -> None:
    try:
        quota(texts, prices)
    except UsageError as error:
        assert str(error)


def options(storage: object, name: str | None = None) -> Namespace:
    return Namespace(storage=storage and str(storage), study_name=name)


def test_the_only_study_needs_no_name(tuned: str) -> None:
    assert load_study(options(tuned)).study_name == "tuned"
    assert load_study(options(tuned, "tuned")).study_name == "tuned"


def test_the_environment_names_the_storage(tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", tuned)
    assert load_study(options(None)).study_name == "tuned"


def test_a_journal_file_may_be_named_after_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = JournalStorage(JournalFileBackend("redis-tuning.log"))
    optuna.create_study(study_name="s", storage=storage)
    assert load_study(options("redis-tuning.log")).study_name == "s"


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
