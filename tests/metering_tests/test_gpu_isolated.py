"""Isolated trials on GPUs, from a fake driver to the trial table."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.metering_tests.conftest import FakeNvml, ROOT


Nvml = Callable[..., FakeNvml]

pytestmark = pytest.mark.slow

GB = 1_000_000_000

SCRIPT = """
import json, os, types
import optuna
from optuna_quota import Quota, QuotaPruner, QuotaSampler, isolated

GB = 1_000_000_000
optuna.logging.set_verbosity(optuna.logging.WARNING)

def device(i, used, mj=0, mig=0, total=80 * GB):
    return f"device {i} GPU-{i} {mig} {int(total)} {int(used)} {int(mj)}\\n"

def tune(objective, n_trials=1, n_jobs=1, gpus_per_trial=None, seed=1, **limits):
    sampler = QuotaSampler(
        optuna.samplers.RandomSampler(seed=seed),
        quota=Quota(n_trials=99),
        gpus_per_trial=gpus_per_trial,
    )
    study = optuna.create_study(sampler=sampler, pruner=QuotaPruner(limits=Limits(**limits)))
    study.optimize(isolated(objective), n_trials=n_trials, n_jobs=n_jobs)
    for trial in study.trials:
        print(json.dumps({"state": trial.state.name, **trial.params, **trial.user_attrs}))
"""


def path_with_torch(folder: Path) -> str:
    (folder / "torch.py").write_text(TORCH)
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture
def rows(nvml: Nvml, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(code: str, *, has_driver: bool = True, **environment: str) -> list[dict[str, Any]]:
        if "from torch import" in code:
            environment["PYTHONPATH"] = path_with_torch(tmp_path)
        out = nvml().run_apart(SCRIPT + code, has_driver=has_driver, **environment)
        found = [line for line in out.splitlines() if line.startswith("{")]
        return [{k.removeprefix("quota:"): v for k, v in json.loads(x).items()} for x in found]

    return run


Rows = Callable[..., list[dict[str, Any]]]


def test_in_a_container_a_limit_holds_and_the_row_has_the_source(rows: Rows) -> None:
    found = rows(
        """
def state(held, *mine):
    say(device(0, 10 * GB + held) + f"ghost 0 77777777 {10 * GB}\\n" + "".join(mine))

def objective(trial):
    held = (2 + 3 * (trial.number % 2)) * GB
    state(held, f"ghost 0 4190000 {held}\\n")
    try:
        time.sleep(20 if held > 4 * GB else 1)
    finally:
        state(0)
    return 1.0

state(0)
tune(objective, n_trials=3, gpu_memory=4 * GB)
"""
    )
    assert [row["outcome"] for row in found] == ["completed", "terminated", "completed"]
    assert [row["gpu_memory"] for row in found] == [2 * GB, 5 * GB, 2 * GB]
    assert {row["gpu_source"] for row in found} == {"device"}


def test_an_isolated_trial_is_measured_by_process(rows: Rows) -> None:
    found = rows(
        """
def objective(trial):
    held = (5 - 2 * trial.number) * GB
    say(device(0, held) + f"process 0 {os.getpid()} {held}\\n")
    time.sleep(0.3)
    return 1.0

say(device(0, 0))
tune(objective, n_trials=2, gpu_memory=9 * GB)
"""
    )
    assert [row["gpu_memory"] for row in found] == [5 * GB, 3 * GB]
    assert {row["gpu_source"] for row in found} == {"process"}


# In place of the real one, which takes seconds to import in each trial.
TORCH = """
import types

cuda = types.SimpleNamespace(is_initialized=lambda: False)

def manual_seed(seed):
    pass

class OutOfMemoryError(RuntimeError):
    pass
"""
OOM = """
from torch import OutOfMemoryError

TEXT = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of {} of "
TEXT += "which 4.00 MiB is free."

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    held = int((1 + x) * GB)
    say(device(0, 79 * GB) + f"process 0 {os.getpid()} {held}\\n")
    if trial.number < 5:
        raise OutOfMemoryError(TEXT.format("74.51 GiB"))
    time.sleep(0.06)
    return x

say(device(0, 0))
"""


def test_a_gpu_filled_by_others_fails_the_trial_without_a_breach(rows: Rows) -> None:
    found = rows(OOM + "tune(objective, n_trials=10, seed=0, gpu_memory=10 * GB)")
    assert [row["outcome"] for row in found] == ["failed"] * 5 + ["completed"] * 5
    assert {row["state"] for row in found[:5]} == {"FAIL"}
    for row in found[:5]:
        assert "breach" not in row
        # Read at the moment of the error, though there was no time for a reading before it.
        assert row["gpu_memory"] == int((1 + row["x"]) * GB)
        assert row["reason"].startswith("The GPU was full, 7")
        assert "of it taken by other processes: the trial held " in row["reason"]
    # From the ninth trial on points would be refused, if those were breaches.
    assert max(row["x"] for row in found[8:]) > 0.8


def test_an_objective_that_prunes_itself_for_it_is_pruned(rows: Rows) -> None:
    (row,) = rows(
        OOM
        + """
def pruning(trial):
    try:
        return objective(trial)
    except OutOfMemoryError:
        raise optuna.TrialPruned

tune(pruning, gpu_memory=10 * GB)
"""
    )
    assert (row["state"], row["outcome"]) == ("PRUNED", "pruned")
    assert "breach" not in row


def test_on_request_and_with_ask_and_tell_the_error_is_raised(nvml: Nvml, tmp_path: Path) -> None:
    code = """
study = optuna.create_study(pruner=QuotaPruner(limits=Limits(gpu_memory=10 * GB)))
for run in (
    lambda: study.optimize(isolated(objective, on_crash="raise"), n_trials=1),
    lambda: isolated(objective)(study.ask()),
):
    try:
        run()
    except OutOfMemoryError as error:
        print("raised")
"""
    out = nvml().run_apart(SCRIPT + OOM + code, PYTHONPATH=path_with_torch(tmp_path))
    assert out.split().count("raised") == 2


@pytest.mark.parametrize("fraction", [0.8, 0.1])
def test_caps_are_relative_to_the_visible_instance(rows: Rows, fraction: float) -> None:
    instance = "MIG-small" if fraction == 0.8 else "MIG-large"
    (row,) = rows(
        """
def objective(trial):
    trial.set_user_attr("fraction", float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]))
    return 1.0

say(device(0, 0, mig=1) + "instance 0 0\\ninstance 0 1\\n"
    + f"device 100 MIG-small 0 {5 * GB} 0 0\\ndevice 101 MIG-large 0 {40 * GB} 0 0\\n")
tune(objective, gpu_memory=4 * GB)
""",
        CUDA_VISIBLE_DEVICES=instance,
    )
    assert row["fraction"] == fraction


def test_trials_with_a_gpu_each_in_a_container(rows: Rows) -> None:
    found = rows(
        """
STATE = os.environ["FAKE_NVML"]

def objective(trial):
    mine = os.environ["CUDA_VISIBLE_DEVICES"]
    trial.set_user_attr("mine", mine)
    held = {"GPU-0": 3, "GPU-1": 7}[mine]
    with open(STATE + ".flag" + mine, "w"):
        pass
    while not all(os.path.exists(STATE + ".flagGPU-" + i) for i in "01"):
        time.sleep(0.01)
    time.sleep(0.3)
    say(device(0, 3 * GB) + device(1, 7 * GB))
    time.sleep(0.4)
    return 1.0

say(device(0, 0) + device(1, 0))
tune(objective, n_trials=2, n_jobs=2, gpus_per_trial=1, gpu_memory=60 * GB)
"""
    )
    held = {row["mine"]: row["gpu_memory"] for row in found}
    assert held == {"GPU-0": 3 * GB, "GPU-1": 7 * GB}


FAKE_TORCH = """
def objective(trial):
    peak = {peak}
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_reserved=lambda device: peak * (1 + device),
    )
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    return 1.0
"""


def test_without_a_driver_the_frameworks_own_counters_are_used(rows: Rows) -> None:
    code = FAKE_TORCH.format(peak=GB) + "tune(objective)\n"
    (row,) = rows(code, has_driver=False)
    assert (row["gpu_memory"], row["gpu_source"]) == (3 * GB, "framework")


def test_memory_that_a_framework_caches_is_read_before_the_process_ends(rows: Rows) -> None:
    code = FAKE_TORCH.format(peak=GB).replace(
        "    return 1.0",
        """    time.sleep(0.5)  # between two readings from now on, whenever those are
    say(device(0, 4 * GB, 50_000) + f"process 0 {os.getpid()} {4 * GB}\\n")
    return 1.0""",
    )
    # Readings are far apart where they take long; the first and the last are of the trial's ends.
    slow = "from optuna_quota._metering import gpu_meter; gpu_meter._PERIOD = 30.0\n"
    (row,) = rows(slow + code + "say(device(0, 0))\ntune(objective)\n")
    assert (row["gpu_memory"], row["gpu_source"]) == (4 * GB, "process")


def test_a_framework_without_gpu_use_records_nothing(rows: Rows) -> None:
    (row,) = rows(FAKE_TORCH.format(peak=0) + "tune(objective)\n", has_driver=False)
    assert "gpu_memory" not in row and "gpu_source" not in row


def test_trials_with_two_gpus_each_are_measured_on_both(rows: Rows) -> None:
    found = rows(
        """
STATE = os.environ["FAKE_NVML"]
PAIRS = ("GPU-3,GPU-1", "GPU-2,GPU-0")
HELD = {"GPU-3": 3, "GPU-1": 1, "GPU-2": 7, "GPU-0": 5}

def objective(trial):
    mine = os.environ["CUDA_VISIBLE_DEVICES"]
    trial.set_user_attr("mine", mine)
    with open(STATE + ".flag" + mine, "w"):
        pass
    while not all(os.path.exists(STATE + ".flag" + pair) for pair in PAIRS):
        time.sleep(0.01)
    say("".join(device(int(name[4:]), held * GB) for name, held in HELD.items()))
    time.sleep(0.5)
    return 1.0

say("".join(device(i, 0) for i in range(4)))
tune(objective, n_trials=2, n_jobs=2, gpus_per_trial=2, gpu_memory=90 * GB)
""",
        CUDA_VISIBLE_DEVICES="3,1,2,0",
    )
    held = {row["mine"]: (row["gpu_memory"], row["gpu_source"]) for row in found}
    assert held == {"GPU-3,GPU-1": (4 * GB, "device"), "GPU-2,GPU-0": (12 * GB, "device")}


@pytest.mark.parametrize("has_room", [True, False])
def test_a_trial_that_found_its_gpu_full_is_tried_again_where_there_is_room(
    rows: Rows, has_room: bool
) -> None:
    elsewhere = 0 if has_room else 79.5
    found = rows(
        OOM.replace("say(device(0, 0))", "")
        + f"""
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    trial.set_user_attr("gpu", gpu)
    if gpu == "GPU-0" or {elsewhere}:
        # A colleague's job has just started there.
        mine = f"process {{gpu[4:]}} {{os.getpid()}} {{GB}}\\n"
        say(device(0, 79 * GB) + device(1, {elsewhere} * GB) + mine)
        raise OutOfMemoryError(TEXT.format("74.51 GiB"))
    return x

say(device(0, 0) + device(1, 0))
tune(objective, n_trials=2, gpus_per_trial=1, gpu_memory=10 * GB)
""",
    )
    first, second = found
    assert (first["outcome"], first["gpu"]) == ("failed", "GPU-0")
    assert first["reason"].startswith("The GPU was full")
    if has_room:
        assert (second["outcome"], second["gpu"]) == ("completed", "GPU-1")
        assert (second["retry_of"], second["x"]) == (0, first["x"])
    else:
        assert "retry_of" not in second


HANGING = """
from optuna_quota._metering import nvml

nvml.ANSWER_TIME = 0.5
STATE = device(0, 3 * GB) + "process 0 {{}} {{}}\\n".format(me, GB)

def objective(trial):
    say(STATE + "process 0 {{}} {{}}\\n".format(os.getpid(), 2 * GB) + {during!r})
    time.sleep(1)
    say(STATE + {after!r})
    return 1.0

say(STATE + {before!r})
tune(objective, n_trials=2, gpus_per_trial={gpus}, gpu_memory=90 * GB, wall_time=20)
"""


@pytest.mark.parametrize("gpus", [None, 1])
@pytest.mark.parametrize(
    "function", ["nvmlInitWithFlags", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo"]
)
def test_a_driver_that_hangs_at_first_holds_up_no_trial(
    rows: Rows, function: str, gpus: int | None
) -> None:
    code = HANGING.format(before=f"hang {function}\n", during="", after="", gpus=gpus)
    if gpus:
        code = code.replace("tune(", "host._STUDY_START_TIME = 0.5\ntune(")
        code = f"from optuna_quota._metering import host\n{code}"
    first, second = rows(code)
    assert [first["outcome"], second["outcome"]] == ["completed", "completed"]
    assert "gpu_memory" not in first
    # It answers again meanwhile.
    assert second["gpu_memory"] == 2 * GB


def test_a_driver_that_hangs_at_the_end_of_a_trial_does_not_hold_it_up(rows: Rows) -> None:
    hang = "hang nvmlDeviceGetMemoryInfo\n"
    first, second = rows(HANGING.format(before="", during="", after=hang, gpus=None))
    assert [first["outcome"], second["outcome"]] == ["completed", "completed"]
    assert first["gpu_memory"] == 2 * GB
    assert first["wall_time"] < 10


def test_a_driver_that_lets_others_wait_while_cuda_starts_is_asked_again_soon(rows: Rows) -> None:
    (row,) = rows(
        """
def objective(trial):
    say(device(0, 0) + "hang nvmlDeviceGetMemoryInfo\\n")
    time.sleep(0.3)
    say(device(0, 0))
    time.sleep(0.3)
    say(device(0, 3 * GB) + f"process 0 {os.getpid()} {3 * GB}\\n")
    time.sleep(1)
    say(device(0, 0))
    return 1.0

say(device(0, 0))
tune(objective, gpu_memory=9 * GB)
"""
    )
    assert (row["outcome"], row["gpu_memory"]) == ("completed", 3 * GB)
