"""Workers that die, that seem dead, and that come back; the thread that renews reservations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import logging
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, Quota, status, Usage
from optuna_quota._ledger import heartbeat as heartbeat_module
from optuna_quota._ledger.heartbeat import (
    charge_orphan,
    Heartbeat,
    Leases,
    OrphanedTrial,
    others_run,
    RunningTrial,
    RunningTrials,
    usage_rates,
)
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.protocol import (
    is_alive,
    Reservation,
    reservation_object,
    this_worker,
    Worker,
)
from optuna_quota._ledger.totals import Entry
from optuna_quota._optuna import stale_trial_ids, storage_of, study_id_of, trial_id_of
from optuna_quota._records import RESERVATION
from tests.ledger_tests.test_ledger import begin, extend, finish, reserve
from tests.ledger_tests.workers import load, start
from tests.storages import Address, storage_at, study_in


ELSEWHERE = Worker("far", "another machine", "", 7, 1.0)


class FakeClock:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def hold(address: Address, name: str, quota: Quota, held: Connection) -> None:
    study = load(address, name)
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    row = storage_of(study).get_trial(trial_id_of(trial))
    answer = Ledger(study, quota).reserve(row, limits=Limits(), footprint={"cpu_time": 8.0})
    assert isinstance(answer, RunningTrial)
    held.send(None)
    time.sleep(300)


@pytest.mark.slow
def test_a_killed_workers_row_ends_as_failed_and_its_use_is_charged(tmp_path: Path) -> None:
    quota = Quota(cpu_time=10, n_trials=5)
    with storage_at("journal-file", tmp_path) as address, study_in(address) as study:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = start(hold, address, study.study_name, quota, sender)
        try:
            # Its row may be readable while it still holds the journal's lock: killed then, it
            # would leave the lock to the others, until the lock's grace period ends.
            assert receiver.poll(60)
        finally:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        ledger = Ledger(study, quota)
        answer = reserve(ledger, begin(study), {"cpu_time": 1.0})
        assert isinstance(answer, RunningTrial)
        dead = study.trials[0]
        assert dead.state == TrialState.FAIL
        assert dead.user_attrs["quota:outcome"] == "failed"
        assert f":{process.pid} died" in dead.user_attrs["quota:reason"]
        charged = status(study, quota=quota).table.loc["cpu_time", "used"]
        assert 0 < charged <= 8
        assert status(study, quota=quota).table.loc["n_trials", "used"] == 1


def occupied(study: optuna.Study, worker: Worker = ELSEWHERE, **details: object) -> int:
    """Leave a running row of another worker in a study."""
    trial_id = trial_id_of(study.ask())
    held = Reservation(trial_id, worker=worker, **details)  # type: ignore[arg-type]
    storage_of(study).set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
    return trial_id


def test_a_worker_elsewhere_is_given_a_lease(caplog: pytest.LogCaptureFixture) -> None:
    study, clock = optuna.create_study(), FakeClock()
    dead = occupied(study, granted={"cpu_time": 9.0}, began=clock.now, used={"cpu_time": 3.0})
    ledger = Ledger(study, Quota(cpu_time=20), clock=clock, lease=60)
    assert isinstance(reserve(ledger, begin(study), {"cpu_time": 1.0}), RunningTrial)
    clock.now += 59
    assert isinstance(reserve(ledger, begin(study), {"cpu_time": 1.0}), RunningTrial)
    assert study.trials[0].state == TrialState.RUNNING
    clock.now += 2
    with caplog.at_level(logging.WARNING, "optuna"):
        assert isinstance(reserve(ledger, begin(study), {"cpu_time": 1.0}), RunningTrial)
    row = storage_of(study).get_trial(dead)
    assert row.state == TrialState.FAIL
    assert "far:7 sent no heartbeat for 1 min 1 s" in row.user_attrs["quota:reason"]
    assert row.user_attrs["quota:cpu_time"] == 3
    # What was last known is a lower bound: what it was granted is charged.
    assert status(study, quota=Quota(cpu_time=20)).table.loc["cpu_time", "used"] == 9


def orphaned(here: bool, silent: float = 0.0, **details: object) -> OrphanedTrial:
    held = Reservation(5, worker=ELSEWHERE, **details)  # type: ignore[arg-type]
    return OrphanedTrial(Entry(0, 5, "running", reservation=held), "It died.", silent, here)


def test_a_dead_workers_trial_is_charged_what_was_seen_and_the_time_after_it() -> None:
    granted, seen = {"cpu_time": 900.0, "gpu_time": 900.0}, {"wall_time": 30.0, "cpu_time": 40.0}
    dead = orphaned(True, granted=granted, began=100.0, beat=130.0, used=seen)
    rates = {"cpu_time": 1.0, "gpu_time": 0.5}
    charged = charge_orphan(dead, 140.0, rates)
    assert charged == {"trial_time": 40.0, "cpu_time": 50.0, "gpu_time": 5.0}
    # No more than it was granted; and all of that while no trial shows what it may have been.
    assert charge_orphan(dead, 140.0, {"gpu_time": 1e3})["gpu_time"] == 900
    assert charge_orphan(dead, 140.0, {})["gpu_time"] == 900
    # A worker on another machine is only known by its heartbeats.
    far = orphaned(False, silent=60.0, granted=granted, began=100.0, beat=130.0, used=seen)
    assert charge_orphan(far, 9e9, rates)["cpu_time"] == 100
    # A worker that continued without finishing its row has measured it.
    measured = orphaned(False, granted=granted, began=100.0, used={**seen, "gpu_time": 2.0})
    assert charge_orphan(measured, 140.0, rates) == {
        "trial_time": 30.0,
        "cpu_time": 40.0,
        "gpu_time": 2.0,
    }


def test_a_worker_that_died_long_ago_is_charged_no_longer_than_its_lease() -> None:
    """Here the dead worker is noticed when the study is resumed, which may be days later."""
    seen = {"wall_time": 30.0}
    dead = orphaned(True, granted={}, began=100.0, beat=130.0, used=seen)
    assert charge_orphan(dead, 90_000.0, {}, lease=60.0) == {"trial_time": 90.0}
    never_beat = orphaned(True, granted={}, began=100.0)
    assert charge_orphan(never_beat, 90_000.0, {}, lease=60.0) == {"trial_time": 60.0}


def test_no_more_cpu_time_is_charged_than_this_machine_has_cores_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat_module, "cpu_count", lambda: 2.0)
    dead = orphaned(True, granted={"cpu_time": 900.0}, began=100.0, beat=130.0)
    for rates, cpu_time in (({}, 80.0), ({"cpu_time": 64.0}, 80.0), ({"cpu_time": 0.5}, 20.0)):
        assert charge_orphan(dead, 140.0, rates)["cpu_time"] == cpu_time
    # Other machines may have more.
    far = orphaned(False, silent=40.0, granted={"cpu_time": 900.0}, began=100.0)
    assert charge_orphan(far, 140.0, {"cpu_time": 10.0})["cpu_time"] == 400


def test_rates_are_those_of_the_study_s_trials() -> None:
    study = optuna.create_study()
    for cpu_time, wall_time, state in ((3.0, 2.0, "COMPLETE"), (1.0, 2.0, "PRUNED")):
        usage = {"quota:cpu_time": cpu_time, "quota:wall_time": wall_time}
        value = 1.0 if state == "COMPLETE" else None
        study.add_trial(
            optuna.trial.create_trial(state=TrialState[state], value=value, user_attrs=usage)
        )
    study.ask()
    assert usage_rates(study.trials) == {"cpu_time": 1.5}


def test_a_sign_of_life_renews_a_lease() -> None:
    study, clock = optuna.create_study(), FakeClock()
    trial_id = occupied(study, granted={"cpu_time": 9.0}, began=clock.now, beat=1.0)
    ledger = Ledger(study, Quota(cpu_time=100), clock=clock, lease=60)
    for beat in range(2, 6):
        reserve(ledger, begin(study), {"cpu_time": 1.0})
        clock.now += 50
        held = Reservation(trial_id, {"cpu_time": 9.0}, worker=ELSEWHERE, began=1.0, beat=beat)
        storage_of(study).set_trial_system_attr(trial_id, RESERVATION, reservation_object(held))
    assert study.trials[0].state == TrialState.RUNNING


def test_a_worker_with_a_longer_lease_is_not_considered_dead() -> None:
    study, clock = optuna.create_study(), FakeClock()
    held = {"began": clock.now, "beat": time.time() - 500, "every": 150.0}
    occupied(study, granted={"cpu_time": 9.0}, **held)
    # It counts as running while its own lease of ten minutes lasts.
    assert others_run(study)
    ledger = Ledger(study, Quota(cpu_time=100), clock=clock, lease=60)
    for seconds, state in ((0, "RUNNING"), (299, "RUNNING"), (2, "FAIL")):
        clock.now += seconds
        reserve(ledger, begin(study), {"cpu_time": 1.0})
        assert study.trials[0].state.name == state


def test_a_trial_that_waits_for_a_dead_worker_is_admitted() -> None:
    study, clock = optuna.create_study(), FakeClock()
    occupied(study, granted={"memory": 8.0}, began=clock.now, worker=this_machine(pid=2**22))
    ledger = Ledger(study, Quota(memory="10B"), clock=clock)
    assert isinstance(reserve(ledger, begin(study), {"memory": 5.0}), RunningTrial)


def test_a_worker_that_asks_for_a_whole_lease_is_dead_though_its_process_lives() -> None:
    study, clock = optuna.create_study(), FakeClock()
    mine = begin(study)
    asking = occupied(study, worker=this_worker(), asked={"memory": 8.0})
    ledger = Ledger(study, Quota(memory="10B"), clock=clock, lease=60)
    assert isinstance(reserve(ledger, mine, {"memory": 5.0}), RunningTrial)
    assert clock.now > 1_000_060
    assert storage_of(study).get_trial(asking).state == TrialState.FAIL


def test_a_worker_that_wakes_after_its_lease_changes_nothing() -> None:
    study = optuna.create_study()
    quota = Quota(cpu_time=100)
    sleeper, awake = Ledger(study, quota), Ledger(study, quota)
    trial = begin(study)
    assert isinstance(reserve(sleeper, trial, {"cpu_time": 10.0}), RunningTrial)
    storage_of(study).set_trial_state_values(trial_id_of(trial), TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        extend(sleeper, trial, cpu_time=0.0)
    with pytest.raises(ValueError, match="Cannot tell a FAIL trial"):
        study.tell(trial.number, 1.0)
    assert isinstance(reserve(awake, begin(study), {"cpu_time": 90.0}), RunningTrial)


def test_an_untouched_row_is_failed_too() -> None:
    study, clock = optuna.create_study(), FakeClock()
    study.ask()
    begun = study.ask()
    begun.suggest_float("x", 0, 1)
    ledger = Ledger(study, Quota(n_trials=1), clock=clock, lease=60)
    clock.now += 10
    ledger.reserve(begin(study), limits=Limits(), footprint={})
    clock.now += 601
    ledger.reserve(begin(study), limits=Limits(), footprint={})
    assert study.trials[0].state == TrialState.FAIL
    assert "never started" in study.trials[0].user_attrs["quota:reason"]
    assert study.trials[1].state == TrialState.RUNNING
    assert status(study, quota=Quota(n_trials=1)).table.loc["n_trials", "used"] == 0


def test_attributes_that_a_retried_trial_copied_are_cleared() -> None:
    study = optuna.create_study()
    first = occupied(study, granted={"cpu_time": 9.0}, began=1.0)
    copied = storage_of(study).get_trial(first)
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING, system_attrs=copied.system_attrs, user_attrs={}
        )
    )
    again = begin(study)
    assert again.number == 1 and RESERVATION in again.system_attrs
    assert status(study, quota=Quota(cpu_time=20)).table.loc["cpu_time", "reserved"] == 9


@pytest.mark.slow
def test_resuming_continues_the_ledger(tmp_path: Path) -> None:
    quota = Quota(cpu_time=10)
    url = f"sqlite:///{tmp_path}/resumed.db"
    study = optuna.create_study(storage=url, study_name="one")
    ledger = Ledger(study, quota)
    trial = begin(study)
    reserve(ledger, trial, {"cpu_time": 7.0})
    finish(study, ledger, trial, Usage(cpu_time=7.0))
    again = optuna.create_study(storage=url, study_name="one", load_if_exists=True)
    refusal = reserve(Ledger(again, quota), begin(again), {"cpu_time": 7.0})
    assert not isinstance(refusal, RunningTrial) and refusal.used == 7


def this_machine(pid: int) -> Worker:
    here = this_worker()
    return Worker(here.host, here.machine, here.space, pid, 1.0)


def test_a_worker_is_identified_by_its_process_and_its_start() -> None:
    here = this_worker()
    assert is_alive(here) is True
    assert (
        is_alive(Worker(here.host, here.machine, here.space, here.pid, here.started - 1)) is False
    )
    assert is_alive(this_machine(pid=2**22)) is False
    assert is_alive(Worker(here.host, "another boot", here.space, here.pid, 1.0)) is None
    assert is_alive(Worker(here.host, here.machine, "another space", here.pid, 1.0)) is None


def test_a_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert is_alive(this_machine(pid)) is False
    finally:
        os.waitpid(pid, 0)


def test_a_heartbeat_missed_by_the_storage_ends_a_lease_early() -> None:
    leases = Leases(60, lambda worker: None)
    entry = Entry(0, 5, "running", reservation=Reservation(5, worker=ELSEWHERE))
    assert not leases.find_orphaned([entry], 0.0)
    (orphan,) = leases.find_orphaned([entry], 1.0, stale=[5])
    assert "far:7 sent no heartbeat" in orphan.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_the_storages_own_heartbeat_is_asked(tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{tmp_path}/beats.db", heartbeat_interval=1, grace_period=1
    )
    study = optuna.create_study(storage=storage)
    dead = occupied(study, granted={"cpu_time": 2.0}, began=1.0)
    storage.record_heartbeat(dead)
    deadline = time.monotonic() + 60
    while not stale_trial_ids(storage_of(study), study_id_of(study)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ledger = Ledger(study, Quota(cpu_time=10), lease=3600)
    assert isinstance(reserve(ledger, begin(study), {"cpu_time": 1.0}), RunningTrial)
    row = storage_of(study).get_trial(dead)
    assert row.state == TrialState.FAIL
    assert "sent no heartbeat" in row.user_attrs["quota:reason"]


def test_a_trial_starts_while_another_thread_looks_through_those_that_run() -> None:
    running: Any = RunningTrials()

    class Trial(SimpleNamespace):
        @property
        def thread(self) -> int:
            # Another thread starts a trial at this moment.
            running[1] = SimpleNamespace(thread=0, in_optimize=False)
            return threading.get_ident()

    running[0] = Trial(trial_id=0, number=0, in_optimize=True, monitor=None)
    assert [trial.number for trial in running.in_optimize_here()] == [0]


class Owner:
    def extend(self, trial_id: int) -> None: ...

    def beat(self, trial_id: int) -> None: ...


def test_a_thread_that_is_to_write_in_a_thousand_years_extends_until_then() -> None:
    extended = threading.Event()

    class Extending(Owner):
        def extend(self, trial_id: int) -> None:
            extended.set()

    owner = Extending()
    heartbeat = Heartbeat(owner.extend, owner.beat, 1e12)
    heartbeat.add(0)
    thread = heartbeat._thread
    assert thread is not None
    # Its first wait is over before it is asked.
    thread.join(0.1)
    heartbeat.request_extension(0)
    assert extended.wait(60)
    heartbeat.remove(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_frees_the_owner_though_the_thread_held_its_lock() -> None:
    owner = Owner()
    heartbeat = Heartbeat(owner.extend, owner.beat, 60)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(heartbeat._wake.acquire).result()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            del owner
            os._exit(0)
        thread.submit(heartbeat._wake.release).result()
    assert os.waitpid(pid, 0)[1] == 0
