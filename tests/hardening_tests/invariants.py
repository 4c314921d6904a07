"""One study of several workers, and what holds of it after every step."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import RuleBasedStateMachine
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaExhausted
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import status
from optuna_quota import trial_table
from optuna_quota import Usage
from optuna_quota._ledger.dead_workers import LEASE
from optuna_quota._ledger.reservation import parse_reservation
from optuna_quota._ledger.reservation import Reservation
from optuna_quota._optuna import trial_id_of
from optuna_quota._records import read_record
from optuna_quota._records import RESERVATION
from tests.hardening_tests.studies import ENDS
from tests.hardening_tests.studies import FAULTS
from tests.hardening_tests.studies import GIB
from tests.hardening_tests.studies import hunger
from tests.hardening_tests.studies import limits_given
from tests.hardening_tests.studies import Open
from tests.hardening_tests.studies import quotas
from tests.hardening_tests.studies import SAMPLERS
from tests.hardening_tests.studies import spaces
from tests.hardening_tests.world import KINDS
from tests.hardening_tests.world import Process
from tests.hardening_tests.world import World
from tests.hardening_tests.world import WouldWait


class Kept(RuleBasedStateMachine):
    """One study, three workers on two machines; what they do is up to a subclass."""

    @initialize(
        kind=st.sampled_from(KINDS),
        sampler=st.sampled_from(sorted(SAMPLERS)),
        space=spaces,
        quota=quotas,
        limits=limits_given,
        footprint=st.sampled_from([None, None, hunger, Usage(memory=2 * GIB, cpu_time=9)]),
        on_veto=st.sampled_from(["auto", "redraw", "nearest", "skip"]),
        seed=st.integers(0, 99),
    )
    def begin(
        self,
        kind: str,
        sampler: str,
        space: list[tuple[BaseDistribution, bool]],
        quota: Quota,
        limits: Limits,
        footprint: Any,
        on_veto: Any,
        seed: int,
    ) -> None:
        self.world = World(kind)
        self.space, self.quota, self.limits = space, quota, limits
        self.make_sampler, self.seed = SAMPLERS[sampler], seed
        self.footprint, self.on_veto = footprint, on_veto
        self.open: list[Open] = []
        # Rows that nobody will finish while their process lives, as Optuna has it.
        self.lost: set[int] = set()
        optuna.create_study(storage=self.world.storage, study_name="it")
        for machine in ("here", "here", "there"):
            self.start(machine)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.end()
        finally:
            self.world.close()

    def start(self, machine: str) -> Process:
        """Start a worker."""
        process = self.world.start(machine)
        self.seed += 1
        base: BaseSampler = self.make_sampler(self.seed)
        sampler = QuotaSampler(
            base,
            quota=self.quota,
            footprint=self.footprint,
            on_veto=self.on_veto,
        )
        process.study = optuna.load_study(
            study_name="it",
            storage=self.world.storage,
            sampler=sampler,
            pruner=QuotaPruner(limits=self.limits),
        )
        return process

    @contextlib.contextmanager
    def faults_allowed(self) -> Iterator[None]:
        """Let only the fault come out that a trap has raised."""
        self.world.trap.fired = False
        try:
            yield
        except FAULTS as error:
            assert self.world.trap.fired and "on purpose" in str(error)

    def rows(self) -> list[FrozenTrial]:
        """Return all rows."""
        return self.living[0].study.get_trials(deepcopy=False)

    @property
    def living(self) -> list[Process]:
        """All workers."""
        return self.world.living

    @invariant()
    def rows_are_whole(self) -> None:
        if not hasattr(self, "world"):
            return
        held = {each.trial.number for each in self.open}
        for row in self.rows():
            if row.state == TrialState.RUNNING:
                assert row.number in held | self.lost, row
            elif row.state.is_finished():
                record = read_record(row)
                assert record.outcome in ENDS[row.state], row
                assert record.reason or record.outcome == "completed", row

    @invariant()
    def the_quota_holds(self) -> None:
        if not hasattr(self, "world"):
            return
        found = status(self.living[0].study, quota=self.quota)
        rows, beyond = self.rows(), {"cpu_time": 0.0, "trial_time": 0.0}
        holding: dict[str, float] = {}
        for row in rows:
            held = parse_reservation(row.system_attrs.get(RESERVATION), trial_id_of(row))
            held = held or Reservation()
            used = read_record(row).usage
            for name, amount in (("cpu_time", used.cpu_time), ("trial_time", used.wall_time)):
                beyond[name] += max(0.0, (amount or 0.0) - held.granted.get(name, 0.0))
            if row.state == TrialState.RUNNING and held.worker is not None:
                machine, memory = held.worker.machine, held.granted.get("memory", 0.0)
                holding[machine] = holding.get(machine, 0.0) + memory
        for line in found.lines:
            if line.resource != "memory" and line.quota is not None:
                total = (line.used or 0.0) + (line.reserved or 0.0)
                assert total <= line.quota + beyond.get(line.resource, 0.0) + 1e-6, line
        if self.quota.memory is not None:
            assert all(amount <= self.quota.memory for amount in holding.values())

    def end(self) -> None:
        """Kill all workers; another one then ends what they left, and starts a trial if it can."""
        self.world.trap.disarm()
        for process in list(self.living):
            self.world.kill(process)
        self.open = []
        last = self.start("here")
        mine = []
        for attempt in range(3):
            with self.world.acting(last):
                try:
                    mine += [] if mine else [last.study.ask().number]
                except QuotaExhausted as error:
                    assert str(error)
                except WouldWait:
                    # The dead of another machine are given a lease.
                    assert attempt < 2, "nobody lives whom it could wait for"
                last.study.sampler._session(last.study, self.limits).ledger._undertaker.look()
            self.world.advance(11 * LEASE)
        assert str(status(last.study))
        assert len(trial_table(last.study)) == len(self.rows())
        left = [row for row in self.rows() if row.state == TrialState.RUNNING]
        assert {row.number for row in left} <= set(mine), left
