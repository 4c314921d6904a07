"""What an objective carries: held once in its trial, and files that are mapped to memory."""

from __future__ import annotations

import mmap
from pathlib import Path
import sys

import numpy as np
import pytest

from optuna_quota._isolation.payload import FileRegion, MappedFiles
from optuna_quota._isolation.reducers import memory_address
from tests.isolation_tests.scripts import run_script


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mappings")


CARRIED = """
import numpy as np

MIB = 2**20
CARRIED = {
    "text": "x" * (40 * MIB),
    "bytes": bytes(40 * MIB),
    "records": np.zeros(40 * MIB // 8, [("a", "f8")]).view(np.recarray),
    "columns": np.ones((40 * MIB // 8, 2))[:, 1],
}
found = {}
for name, value in CARRIED.items():
    def objective(trial, value=value):
        return float(len(value) > 0)
    study = optuna.create_study()
    study.optimize(isolated(objective), n_trials=1)
    found[name] = study.trials[0].user_attrs["quota:memory"] / (40 * MIB)
say(**found)
"""


@pytest.mark.slow
def test_data_that_an_objective_carries_is_held_once(tmp_path: Path) -> None:
    found = run_script(tmp_path, CARRIED)
    assert set(found) == {"text", "bytes", "records", "columns"}
    # The interpreter with its modules is half of it at most.
    assert all(1.0 <= share < 1.9 for share in found.values()), found


# Memory that a file is mapped to.


def find(array: np.ndarray) -> FileRegion | None:
    size = array.nbytes
    return MappedFiles().find(memory_address(array), size, readonly=not array.flags.writeable)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.arange(4000, dtype="u1").tofile(tmp_path / "data.bin")
    return tmp_path / "data.bin"


@needs_linux
def test_a_part_of_a_file(path: Path) -> None:
    array = np.memmap(path, mode="r", offset=10)[5:105]
    region = find(array)
    assert region == FileRegion(str(path), 15, 100, readonly=True, shared=True)
    assert region.open() == array.data and region.open().readonly


@needs_linux
def test_changes_of_a_shared_mapping_reach_the_file(path: Path) -> None:
    region = find(np.memmap(path, mode="r+"))
    assert region is not None
    region.open()[3] = 77
    assert path.read_bytes()[3] == 77


@needs_linux
def test_a_private_copy_without_changes_is_the_file(path: Path) -> None:
    array = np.memmap(path, mode="c")
    region = find(array)
    assert region is not None and not region.shared
    region.open()[3] = 77
    assert array[3] == path.read_bytes()[3] == 3
    array[0] = 1
    assert find(array) is None


@needs_linux
def test_arrays_that_are_not_mapped_from_a_file(path: Path) -> None:
    assert find(np.arange(100_000)) is None
    assert find(np.frombuffer(mmap.mmap(-1, 4096), "u1")) is None
    assert find(np.empty(0)) is None
    replaced = np.memmap(path, mode="r")
    path.unlink()
    path.write_bytes(bytes(4000))
    assert find(replaced) is None


@needs_linux
def test_a_file_that_was_cut_off(path: Path) -> None:
    array = np.memmap(path, mode="r")
    with path.open("r+b") as file:
        file.truncate(100)
    assert find(array) is None


MAPPED = """
import numpy as np

np.ones((30 * 2**20 // 80, 10)).tofile("data.bin")
DATA = np.memmap("data.bin", mode="r").view("f8").reshape(-1, 10)
PLAIN, GAPS, BACKWARDS = np.asarray(DATA)[100:, 2:], DATA[::7], DATA.T[::-1]
RESULTS = np.memmap("results.bin", "f8", "w+", shape=(4,))

def objective(trial):
    RESULTS[trial.number] = trial.number + 1
    assert (type(GAPS), type(PLAIN)) == (np.memmap, np.ndarray)
    return float(PLAIN[:10].sum() + GAPS[3].sum() + BACKWARDS[0, :3].sum() + DATA[5].sum())

study = optuna.create_study()
study.optimize(isolated(objective), n_trials=2)
say(values=[t.value for t in study.trials], results=list(np.fromfile("results.bin")),
    most=max(t.user_attrs["quota:memory"] for t in study.trials))
"""


@needs_linux
def test_arrays_in_files_are_no_memory_of_trials(tmp_path: Path) -> None:
    found = run_script(tmp_path, MAPPED)
    assert found["values"] == [103.0, 103.0]
    assert found["results"] == [1.0, 2.0, 0.0, 0.0]
    assert found["most"] < 30 * 2**20


TENSORS = """
import torch

torch.save({"w": torch.ones(60, 2**17)}, "model.pt")
STATE = torch.load("model.pt", mmap=True)
TURNED = STATE["w"].T
torch.zeros(4).numpy().tofile("results.bin")
RESULTS = torch.from_file("results.bin", shared=True, size=4)

def objective(trial):
    RESULTS[trial.number] = trial.number + 1
    return float(STATE["w"][3, :10].sum() + TURNED[:5, 7].sum())

study = optuna.create_study()
study.optimize(isolated(objective), n_trials=2)
say(values=[t.value for t in study.trials], results=RESULTS.tolist(),
    most=max(t.user_attrs["quota:memory"] for t in study.trials))
"""


@needs_linux
@pytest.mark.slow
@pytest.mark.integration
def test_tensors_in_files_are_no_memory_of_trials(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = run_script(tmp_path, TENSORS)
    assert found["values"] == [15.0, 15.0]
    assert found["results"] == [1.0, 2.0, 0.0, 0.0]
    # With torch, without the model's 60 MiB.
    assert found["most"] < 75 * 2**20
