"""A stateful test's study with several workers, and the invariants after each step."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, RuleBasedStateMachine
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_quota import (
    Limits,
    Quota,
    QuotaExhausted,
    QuotaPruner,
    QuotaSampler,
    status,
    trial_table,
    Usage,
)
from optuna_quota._ledger.heartbeat import LEASE
from optuna_quota._ledger.protocol import parse_reservation, Reservation
from optuna_quota._optuna import trial_id_of
from optuna_quota._records import read_record, RESERVATION
from tests.hardening_tests.simulation import KINDS, Process, Simulation, WouldWait
from tests.hardening_tests.strategies import (
    claimed_usage,
    ENDS,
    FAULTS,
    GIB,
    limits_given,
    OpenTrial,
    quotas,
    SAMPLERS,
    spaces,
)


class StudyInvariants(RuleBasedStateMachine):
    """One study, three workers on two hosts; a subclass defines their steps."""

    @initialize(
        kind=st.sampled_from(KINDS),
        sampler=st.sampled_from(sorted(SAMPLERS)),
        space=spaces,
        quota=quotas,
        limits=limits_given,
        footprint=st.sampled_from([None, None, claimed_usage, Usage(memory=2 * GIB, cpu_time=9)]),
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
        self.simulation = Simulation(kind)
        self.space, self.quota, self.limits = space, quota, limits
        self.make_sampler, self.seed = SAMPLERS[sampler], seed
        self.footprint, self.on_veto = footprint, on_veto
        self.open: list[OpenTrial] = []
        # Running trials whose handle is lost: Optuna ends them only with their process.
        self.lost: set[int] = set()
        optuna.create_study(storage=self.simulation.storage, study_name="it")
        for machine in ("here", "here", "there"):
            self.start(machine)

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        try:
            self.end()
        finally:
            self.simulation.close()

    def start(self, machine: str) -> Process:
        """Start a worker."""
        process = self.simulation.start(machine)
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
            storage=self.simulation.storage,
            sampler=sampler,
            pruner=QuotaPruner(limits=self.limits),
        )
        return process

    @contextlib.contextmanager
    def faults_allowed(self) -> Iterator[None]:
        """Allow an exception only if it is the injected fault."""
        self.simulation.fault.fired = False
        try:
            yield
        except FAULTS as error:
            assert self.simulation.fault.fired and "on purpose" in str(error)

    def rows(self) -> list[FrozenTrial]:
        """Return all rows."""
        return self.processes[0].study.get_trials(deepcopy=False)

    @property
    def processes(self) -> list[Process]:
        """All live workers."""
        return self.simulation.processes

    @invariant()
    def rows_are_complete(self) -> None:
        if not hasattr(self, "simulation"):
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
        if not hasattr(self, "simulation"):
            return
        found = status(self.processes[0].study, quota=self.quota)
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
        """Kill all workers; another one then fails their trials, and starts one if it can."""
        self.simulation.fault.disarm()
        for process in list(self.processes):
            self.simulation.kill(process)
        self.open = []
        last = self.start("here")
        mine = []
        for attempt in range(3):
            with self.simulation.acting_as(last):
                try:
                    mine += [] if mine else [last.study.ask().number]
                except QuotaExhausted as error:
                    assert str(error)
                except WouldWait:
                    # Dead workers of another host keep their lease for a while.
                    assert attempt < 2, "waits although no other worker is alive"
                last.study.sampler._session(last.study).ledger._state.refresh()
            self.simulation.advance(11 * LEASE)
        assert str(status(last.study))
        assert len(trial_table(last.study)) == len(self.rows())
        left = [row for row in self.rows() if row.state == TrialState.RUNNING]
        assert {row.number for row in left} <= set(mine), left
