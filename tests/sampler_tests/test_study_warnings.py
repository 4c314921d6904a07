"""What the log says once about a study, in process and isolated, with and without a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import gc
import logging
from pathlib import Path
import threading
import time

import numpy as np
import optuna
from optuna.samplers import GridSampler, PartialFixedSampler
import pytest

from optuna_quota import check, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._enforcement.study_warnings import describe_ceilings
from optuna_quota._metering import metering_loop
from optuna_quota._metering.monitored_tree import open_tree
from optuna_quota._records import read_record


MIB = 2**20


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        self.pruned: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.said.append(text)
        elif " pruned. " in text:
            self.pruned.append(text)


@pytest.fixture
def log() -> Iterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


def here() -> float:
    """Return the memory of this process, in bytes; without a fork server of earlier tests."""
    gc.collect()
    tree = open_tree(None)
    memory = tree.read(thorough=True, without=metering_loop().trees.excluded_pids).memory
    tree.close()
    assert memory is not None
    return memory


def new_study(
    limits: Limits, quota: Quota | None = None, storage: str | None = None
) -> optuna.Study:
    """Return a study with a QuotaSampler, or with the pruner alone where there is no quota."""
    return optuna.create_study(
        storage=storage,
        study_name="loud",
        load_if_exists=True,
        sampler=None if quota is None else QuotaSampler(quota=quota),
        pruner=QuotaPruner(limits=limits),
    )


def never_asks(trial: optuna.Trial) -> float:
    held = np.ones(60 * MIB // 8)
    time.sleep(0.1)
    return trial.suggest_float("x", 0, 1) + held[0]


def asks(trial: optuna.Trial) -> float:
    held = np.ones(60 * MIB // 8)
    time.sleep(0.1)
    if trial.should_prune():
        raise optuna.TrialPruned
    return trial.suggest_float("x", 0, 1) + held[0]


@pytest.mark.parametrize("quota", [Quota(n_trials=50), None], ids=["sampler", "pruner"])
def test_a_breach_that_was_noticed_late(
    log: Warnings, quota: Quota | None, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    optuna.create_study(storage=storage, study_name="loud")  # imports what it needs
    for objective in (never_asks, asks, asks):
        limits = Limits(memory=here() + 20 * MIB)
        study = new_study(limits, quota, storage)
        study.optimize(objective, n_trials=2)
    text = " ".join(log.said)
    assert text.count("In process, a trial is stopped only where it calls") <= 2
    assert ("completed over a limit" if quota else "completed without a check of") in text
    assert "`isolated(objective)` stops it at any moment." in text
    assert len(log.said) == len(set(log.said)) <= 3
    ended = [read_record(trial).reason for trial in study.trials[2:]]
    assert [text.partition(" pruned. ")[2] for text in log.pruned] == ended
    assert all("Memory limit exceeded" in str(reason) for reason in ended)


def test_limits_of_a_sampler_are_not_checked_by_another_pruner(log: Warnings) -> None:
    limits = Limits(memory=here() + 20 * MIB)
    sampler = QuotaSampler(quota=Quota(n_trials=50), limits=limits)
    optuna.create_study(sampler=sampler).optimize(asks, n_trials=1)
    (text,) = [text for text in log.said if "completed over a limit" in text]
    assert "without a QuotaPruner is stopped only where it calls `optuna_quota.check" in text


@pytest.mark.parametrize("in_process", [True, False])
def test_a_custom_limit_without_its_meter(log: Warnings, in_process: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        check(trial)
        return 0.0

    study = new_study(Limits(custom={"disk": 5.0}))
    study.optimize(objective if in_process else isolated(objective), n_trials=2)
    (text,) = [text for text in log.said if "disk" in text]
    assert text.startswith("The limit on disk can't be enforced: no meter has this name.")


def test_a_reason_follows_what_the_objective_itself_says(log: Warnings) -> None:
    def objective(trial: optuna.Trial) -> float:
        assert trial.should_prune()
        raise optuna.TrialPruned("Pruned at epoch 3.")

    new_study(Limits(wall_time=1e-6), Quota(n_trials=9)).optimize(objective, n_trials=1)
    assert log.pruned == ["Trial 0 pruned. Pruned at epoch 3. Time limit of 0.001 ms exceeded."]


def test_memory_that_earlier_trials_left_in_the_process(log: Warnings) -> None:
    left = []

    def leaks(trial: optuna.Trial) -> float:
        left.append(np.ones(40 * MIB // 8))
        check(trial)
        return 0.0

    limit = 1.2 * here() + 80 * MIB
    new_study(Limits(memory=limit), Quota(n_trials=50)).optimize(leaks, n_trials=5)
    (text,) = [text for text in log.said if "earlier ones left it behind" in text]
    assert "more than before the first trial" in text and "isolated(objective)" in text


def test_a_limit_below_what_the_process_holds_already(log: Warnings) -> None:
    study = new_study(Limits(memory="2MiB"), Quota(n_trials=50))
    with pytest.raises(ValueError, match=r"limit of 2 MiB on memory can never hold: this process"):
        study.optimize(asks, n_trials=2)
    assert read_record(study.trials[0]).outcome == "failed"
    assert sum("can never hold" in text for text in log.said) == 1  # Optuna's own


def test_memory_held_before_the_first_trial_may_be_freed(log: Warnings) -> None:
    class Held:
        def __init__(self) -> None:
            self.itself, self.data = self, np.ones(120 * MIB // 8)

    held: list[Held] = []

    def frees(trial: optuna.Trial) -> float:
        held.clear()
        return asks(trial)

    for keeps in (False, True):  # garbage already, or what the first trial frees
        study = new_study(Limits(memory=here() + 90 * MIB), Quota(n_trials=50))
        held += [Held()][:keeps]
        study.optimize(frees, n_trials=2)
        ended = [trial.state.name for trial in study.trials]
        assert ended == ["PRUNED" if keeps else "COMPLETE", "COMPLETE"]
    assert "can never hold" not in " ".join(log.said)


def test_a_limit_below_what_an_empty_trial_takes() -> None:
    study = new_study(Limits(memory="1MiB"), Quota(n_trials=50))
    with pytest.raises(
        ValueError, match=r"1 MiB on memory can never hold: a trial takes [\d.]+ MiB"
    ):
        study.optimize(isolated(lambda trial: 0.0), n_trials=2)
    assert "can never hold" in str(read_record(study.trials[0]).reason)
    carried = np.ones(60 * MIB // 8)
    tight, roomy = (Limits(memory=f"{size}MiB") for size in (50, 200))
    with pytest.raises(ValueError, match="50 MiB on memory can never hold: a trial takes"):
        new_study(tight).optimize(isolated(lambda trial: carried[0]), n_trials=1)
    study = new_study(roomy)
    study.optimize(isolated(lambda trial: carried[0]), n_trials=1)
    assert study.best_value == 1


def test_a_sampler_that_a_tool_replaces(log: Warnings) -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0, 1)

    study = new_study(Limits(wall_time="1h"), Quota(n_trials=50))
    study.sampler = PartialFixedSampler({"x": 0.5}, study.sampler)
    study.optimize(objective, n_trials=1)
    asked = study.ask()
    optuna.load_study(study_name="loud", storage=study._storage).tell(asked.number, 1.0)
    assert log.said == []
    # As LightGBMTuner does, on a Study object of its own.
    tuned = optuna.load_study(
        study_name="loud", storage=study._storage, sampler=GridSampler({"x": [0.1, 0.2]})
    )
    tuned.optimize(objective, n_trials=2)
    (text,) = log.said
    assert "Trial 2 was sampled by GridSampler" in text and "LightGBMTuner" in text


@pytest.mark.parametrize(
    "run",
    [
        lambda: optuna.create_study(sampler=QuotaSampler(quota=Quota())),
        lambda: optuna.create_study(sampler=QuotaSampler(), pruner=QuotaPruner()),
        lambda: optuna.create_study(pruner=QuotaPruner(limits=Limits())),
    ],
)
def test_nothing_is_limited(log: Warnings, run: Callable[[], optuna.Study]) -> None:
    run().optimize(asks, n_trials=2)
    (text,) = log.said
    assert "Nothing is limited: usage is only recorded" in text


def test_ceilings_above_the_machine_or_the_quota(log: Warnings, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    limits, quota = Limits(memory="900TiB"), Quota(n_trials=50, wall_time="1h")

    def work() -> None:
        new_study(limits, quota, storage).optimize(isolated(lambda trial: 0.0), n_trials=1)

    optuna.storages.RDBStorage(storage)  # makes the tables
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (text,) = log.said
    assert "The limit of 900 TiB on memory is more than the" in text
    machine = {"memory": 8.0 * 2**30, "cpu_cores": 4.0}
    found = describe_ceilings(
        Limits(memory="4GiB", cpu_cores=8, wall_time="2h"),
        Quota(memory="2GiB", cpu_cores=4, trial_time="1h", wall_time="3h"),
        machine,
    )
    assert [text.split(" is more")[0] for text in found] == [
        "The limit of 8 on CPU cores",
        "The limit of 2 h on wall time of a trial",
        "The limit of 4 GiB on memory of a trial",
        "The limit of 8 on CPU cores of a trial",
    ]
    assert describe_ceilings(Limits(memory="1GiB"), Quota(memory="8GiB"), machine) == []
