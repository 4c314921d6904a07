"""Files that a script has opened are open in its trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_quota._isolation import linux
from optuna_quota._isolation.reducers import reduce_open_file, SpawningProcess
from tests.isolation_tests.scripts import METHODS, run_script
from tests.isolation_tests.trials import needs_supervisor


WRITTEN = """
import pathlib, zipfile

log, added, binary = open("log.txt", "w"), open("added.txt", "a+"), open("data.bin", "wb")
pathlib.Path("read.bin").write_bytes(b"0123456789")
with zipfile.ZipFile("all.zip", "w") as archive:
    archive.writestr("one", "text")
archive, read = zipfile.ZipFile("all.zip"), open("read.bin", "rb")
read.read(3)
nowhere = open(os.devnull, "w")
for file in (log, added):
    print("before", file=file)

def objective(trial):
    for file in (log, added):
        print("trial", trial.number, file=file)
    binary.write(b"%d" % trial.number)
    print("lost", file=nowhere)
    assert log.name == "log.txt" and added.mode == "a+"
    assert archive.read("one") == b"text"
    return float(read.read(2))

found = values(objective, methods=[sys.argv[1]])
for file in (log, added):
    print("after", file=file)
binary.write(b"end")
binary.close()
say(found=found[sys.argv[1]], place=read.tell())
"""


@needs_supervisor
@pytest.mark.parametrize("method", METHODS)
def test_files_are_written_in_turn(tmp_path: Path, method: str) -> None:
    (tmp_path / "added.txt").write_text("earlier\n")
    found = run_script(tmp_path, WRITTEN, "script.py", method)
    # A fork has the study's own place.
    assert found == {"found": [34.0, 34.0], "place": 3}
    lines = "before\ntrial 0\ntrial 1\nafter\n"
    assert (tmp_path / "log.txt").read_text() == lines
    assert (tmp_path / "added.txt").read_text() == f"earlier\n{lines}"
    assert (tmp_path / "data.bin").read_bytes() == b"01end"


REFUSED = """
def refused(file):
    def objective(trial):
        return float(file.fileno())
    try:
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    except TypeError as error:
        return "can't be pickled" in str(error)
    return False

gone, (read, write) = open("gone.txt", "wb"), os.pipe()
os.unlink("gone.txt")
say(gone=refused(gone), pipe=refused(os.fdopen(write, "wb")))
"""


def test_what_is_no_file_on_a_disk_is_refused(tmp_path: Path) -> None:
    assert run_script(tmp_path, REFUSED) == {"gone": True, "pipe": True}


def test_without_a_supervisor_no_file_can_be_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(linux, "can_supervise", lambda: False)
    with (tmp_path / "log.txt").open("w") as file:
        assert reduce_open_file(file, SpawningProcess()) is None
