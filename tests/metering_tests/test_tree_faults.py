"""A process tree that can't be read costs what it would have told, and nothing else."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota._metering import metering_loop
from optuna_quota._records import read_record
from optuna_quota.testing import FakeMetering
from optuna_quota.testing import FakeProcessTree


METHODS = ("read", "glance", "age", "reset_peak")


class FaultyTree(FakeProcessTree):
    """Fails in some of its methods."""

    def __init__(self, *failing: str) -> None:
        super().__init__(memory=100.0)
        self.failing = set(failing)

    def _check(self, method: str) -> None:
        if method in self.failing:
            raise OSError(5, "on purpose")

    def read(self, **arguments: Any) -> Any:
        self._check("read")
        return super().read(**arguments)

    def glance(self) -> float | None:
        self._check("glance")
        return super().glance()

    def age(self) -> float:
        self._check("age")
        return super().age()

    def reset_peak(self) -> None:
        self._check("reset_peak")
        super().reset_peak()


def new_study() -> optuna.Study:
    return optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9, trial_time="1h")),
        pruner=QuotaPruner(limits=Limits(memory=1000, wall_time=60)),
    )


def test_a_study_goes_on_with_what_is_known(fake: FakeMetering, warned: list[str]) -> None:
    fake.tree = FaultyTree(*METHODS)
    study = new_study()
    for _ in range(2):
        trial = study.ask()
        fake.advance(5)
        assert not trial.should_prune()
        study.tell(trial, 1.0)
    # Time is read from no tree.
    trial = study.ask()
    fake.advance(61)
    assert trial.should_prune()
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    usages = [read_record(row).usage for row in study.trials]
    assert [usage.wall_time for usage in usages] == [5, 5, 61]
    assert all(usage.memory is None and usage.cpu_time is None for usage in usages)
    (told,) = warned
    assert "not known" in told and "on purpose" in told


def test_what_was_used_during_a_fault_is_known_after_it(fake: FakeMetering) -> None:
    tree = fake.tree = FaultyTree()
    study = new_study()
    trial = study.ask()
    tree.cpu_time, tree.failing = 3.0, set(METHODS)
    fake.advance(5)
    assert not trial.should_prune()
    tree.cpu_time, tree.memory, tree.failing = 7.0, 2000.0, set()
    fake.advance(5)
    assert trial.should_prune()
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    record = read_record(study.trials[0])
    assert (record.usage.cpu_time, record.usage.memory) == (7, 2000)
    assert record.outcome == "terminated"


@pytest.mark.parametrize("failing", METHODS)
def test_the_tree_of_a_process_that_fails_in_one_method(fake: FakeMetering, failing: str) -> None:
    fake.trees[7] = FaultyTree(failing)
    watch = metering_loop().monitor((0, 0), limits=Limits(memory=1000, wall_time=60), pid=7)
    fake.trees[7].memory = 2000.0
    fake.advance(5)
    # This fake reads by a glance.
    assert (watch.breach is None) is (failing in ("read", "glance"))
    # It still has its clock.
    fake.advance(56)
    assert watch.breach is not None
    watch.close()
