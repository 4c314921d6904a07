"""A disk that fills up: the worker ends and says why, and the study goes on when there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import os
from pathlib import Path
import pickle
import subprocess
import sys

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
import pytest

from optuna_quota import Quota, QuotaSampler, status
from optuna_quota._storage_retry import repair_torn_lines
from tests.ledger_tests.workers import start
from tests.storages import Address, study_in


QUOTA = Quota(n_trials=14, trial_time="1h")
# Bytes that are free at first, and what each trial takes of them.
FREE, EACH = 40_000, 6_000
FULL = 7


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    trial.set_user_attr("large", "x" * EACH)
    return x


def tune(storage: BaseStorage, name: str) -> None:
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=QUOTA)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    study.optimize(objective)


def tune_until_full(address: Address, name: str, path: str | None) -> None:
    """End with the status ``FULL`` when the storage can't be written.

    Args:
        address: Where it is.
        name: The study.
        path: The file that must not grow by more than ``FREE``; None where the disk is small.
    """
    import resource

    from optuna_quota._storage_retry import retry

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    # The disk stays full meanwhile.
    retry.__kwdefaults__["timeout"] = 0.2
    if path is not None:
        most = os.path.getsize(path) + FREE
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        tune(address.open(), name)
    except Exception as error:  # noqa: BLE001 - what it was is looked at
        sys.exit(FULL if is_full(error) else 1)


def is_full(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) or "disk I/O error" in text or "disk is full" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.fixture(params=["a file that may not grow", "a small disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder, and whether it is a disk of its own."""
    if request.param == "a file that may not grow":
        if not sys.platform.startswith("linux"):
            pytest.skip("needs Linux: RLIMIT_FSIZE ends a process elsewhere")
        yield tmp_path, False
        return
    options = ["-t", "tmpfs", "-o", f"size={512 * 1024}", "tmpfs", str(tmp_path)]
    mounted = os.getuid() == 0 and subprocess.run(["mount", *options], stderr=subprocess.DEVNULL)
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs to be allowed to mount a disk")
    try:
        yield tmp_path, True
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder: Path) -> None:
    """Leave no more than ``FREE`` bytes of a small disk."""
    found = os.statvfs(folder)
    (folder / "ballast").write_bytes(b"x" * (found.f_bavail * found.f_frsize - FREE))


OPEN: dict[str, Callable[[Path], Address]] = {
    "sqlite": lambda path: Address("sqlite", f"sqlite:///{path}"),
    "journal-file": lambda path: Address("journal-file", str(path)),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix")
@pytest.mark.parametrize("kind", list(OPEN))
def test_a_study_goes_on_when_there_is_room_again(kind: str, place: tuple[Path, bool]) -> None:
    folder, is_disk = place
    path = folder / "study"
    address = OPEN[kind](path)
    with study_in(address) as study:
        if is_disk:
            fill(folder)
        process = start(tune_until_full, address, study.study_name, None if is_disk else str(path))
        process.join(100)
        process.kill()
        process.join()
        assert process.exitcode == FULL
        before = [row for row in study.trials if row.state == TrialState.COMPLETE]
        assert 0 < len(before) < 14
        (folder / "ballast").unlink(missing_ok=True)
        tune(address.open(), study.study_name)
        rows = study.trials
        # No finished result is lost.
        assert [rows[row.number] for row in before] == before
        assert all(row.state.is_finished() for row in rows)
        # Nothing is counted twice: what could not be stored failed, and counts as having run.
        assert status(study).table.loc["n_trials"].to_dict() == {
            "used": 14,
            "reserved": 0,
            "left": 0,
            "quota": 14,
        }
        complete = [row for row in rows if row.state == TrialState.COMPLETE]
        assert 11 <= len(complete) <= 14


def test_a_torn_line_is_taken_out_of_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage)
    repair_torn_lines(storage)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    whole = path.read_bytes()
    for torn in (b'{"op_code":8,"worker_', b"x" * 100_000):
        path.write_bytes(whole + torn)
        # Readers ignore the incomplete line; the next writer removes it.
        assert len(study.trials) == 1
        study.set_user_attr("after", len(torn))
        assert path.read_bytes().startswith(whole) and torn not in path.read_bytes()
        again = JournalStorage(JournalFileBackend(str(path)))
        (found,) = optuna.get_all_study_summaries(again)
        assert found.user_attrs == {"after": len(torn)}


def test_a_journal_is_kept_whole_once_and_can_be_copied(tmp_path: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    repair_torn_lines(storage)
    lock = storage._backend._lock  # type: ignore[attr-defined]
    repair_torn_lines(storage)
    assert storage._backend._lock is lock  # type: ignore[attr-defined]
    study = optuna.create_study(storage=pickle.loads(pickle.dumps(storage)))
    assert study.trials == []
    repair_torn_lines(optuna.storages.InMemoryStorage())
