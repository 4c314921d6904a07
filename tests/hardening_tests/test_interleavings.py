"""Ledger and trial table stay consistent in any order of workers, trials and faults.

Hypothesis chooses the study and the next step of a worker.
"""

from __future__ import annotations

import math

from hypothesis import Phase, settings, strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
import optuna
from optuna.trial import FrozenTrial, TrialState
import pytest

from optuna_quota import check, LimitBreached, QuotaExhausted, TrialRejected
from optuna_quota._optuna import trial_id_of
from optuna_quota._records import read_record
from tests.hardening_tests.invariants import StudyInvariants
from tests.hardening_tests.simulation import Process, WouldWait
from tests.hardening_tests.strategies import FAULTS, GIB, is_low, OpenTrial, unit, value_at


# Hundreds of steps in one test may take minutes on a busy machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("quiet")]


class Interleavings(StudyInvariants):
    """The steps of workers."""

    @rule(who=st.integers(0, 2), at_once=st.booleans())
    def ask(self, who: int, at_once: bool) -> None:
        process = self.processes[who]
        space = {"p0": self.space[0][0]} if at_once else {}
        before = {row.number for row in self.rows() if row.state == TrialState.RUNNING}
        trial = None
        with self.simulation.acting_as(process), self.faults_allowed():
            try:
                trial = process.study.ask(space)
            except QuotaExhausted as error:
                assert error.resource is not None and str(error)
            except WouldWait:
                assert self.open or self.lost, "waits although no trial is running"
            except TrialRejected as error:
                assert at_once and str(error)
        if trial is not None:
            self.open.append(OpenTrial(process, trial, self.simulation.now, asked=len(space)))
            self.note_memory(process)
        elif at_once and self.simulation.fault.fired:
            # Optuna writes the parameters where no hook sees the failure.
            running = {row.number for row in self.rows() if row.state == TrialState.RUNNING}
            self.lost |= running - before

    def note_memory(self, process: Process) -> None:
        """Note the memory of a process, and whether it runs a single trial."""
        mine = [each for each in self.open if each.process is process]
        for each in mine:
            each.steady = each.steady and len(mine) == 1 and not self.lost
            each.highest = max(each.highest, process.metering.tree.memory or 0.0)

    def one(self, which: int) -> OpenTrial:
        """Return one of the open trials."""
        return self.open[which % len(self.open)]

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), count=st.integers(1, 4))
    def suggest(self, which: int, count: int) -> None:
        held = self.one(which)
        with self.simulation.acting_as(held.process), self.faults_allowed():
            try:
                self.suggest_some(held, count)
            except TrialRejected as error:
                assert str(error)
                held.rejected = True

    def suggest_some(self, held: OpenTrial, count: int) -> None:
        for index in range(held.asked, min(held.asked + count, len(self.space))):
            distribution, conditional = self.space[index]
            skipped = conditional and index > 0
            if skipped:
                skipped = not is_low(self.space[0][0], held.trial.params["p0"])
            if not skipped:
                held.trial._suggest(f"p{index}", distribution)
            held.asked = index + 1

    @rule(who=st.integers(0, 2), cpu=st.sampled_from([0.0, 3.0, 11.0]), memory=st.integers(1, 7))
    def use(self, who: int, cpu: float, memory: int) -> None:
        process = self.processes[who]
        process.metering.tree.cpu_time = (process.metering.tree.cpu_time or 0.0) + cpu
        process.metering.tree.memory = memory * 0.9 * GIB
        self.note_memory(process)

    @rule(seconds=st.sampled_from([0.5, 7.0, 45.0, 200.0]))
    def pass_time(self, seconds: float) -> None:
        with self.faults_allowed():
            self.simulation.advance(seconds)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), by_pruner=st.booleans())
    def look(self, which: int, by_pruner: bool) -> None:
        held = self.one(which)
        over = held.steady and (
            self.is_over(self.limits.memory, held.process.metering.tree.memory)
            or self.is_over(self.limits.wall_time, self.simulation.now - held.started)
        )
        with self.simulation.acting_as(held.process), self.faults_allowed():
            try:
                if by_pruner:
                    held.trial.report(0.5, held.reports)
                    held.reports += 1
                    pruned = held.trial.should_prune()
                    held.breached = held.breached or (pruned and not held.rejected)
                else:
                    check(held.trial)
                assert not over or held.breached or held.rejected
            except LimitBreached as error:
                self.judge(held, error)
                held.breached = True
            except TrialRejected:
                assert held.rejected

    def is_over(self, limit: float | None, amount: float | None) -> bool:
        return limit is not None and amount is not None and amount > limit

    def judge(self, held: OpenTrial, error: LimitBreached) -> None:
        """Compare a breach with what was used."""
        assert error.resource is not None and error.limit is not None
        assert error.observed is not None and error.observed >= error.limit
        if error.resource == "memory" and held.steady:
            assert error.observed <= held.highest

    @precondition(lambda self: self.open)
    @rule(
        which=st.integers(0, 9),
        state=st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]),
    )
    def tell(self, which: int, state: TrialState) -> None:
        held = self.one(which)
        if held.rejected and state == TrialState.COMPLETE:
            state = TrialState.PRUNED
        with self.simulation.acting_as(held.process), self.faults_allowed():
            values = 0.25 if state == TrialState.COMPLETE else None
            held.process.study.tell(held.trial, values, state=state)
        row = self.row_of(held)
        if not row.state.is_finished():
            # Optuna's own write failed; `tell` can be called again.
            assert self.simulation.fault.fired
            held.tell_failed = True
            return
        self.open.remove(held)
        assert row.state == state
        record = read_record(row)
        if held.rejected:
            assert record.outcome == "rejected"
        elif held.breached and state != TrialState.COMPLETE:
            assert record.outcome == "terminated" and record.breach is not None
        elif held.breached:
            assert record.breach is not None and record.reason
        if record.outcome == "completed":
            assert (record.reason is None) == (record.breach is None)

    def row_of(self, held: OpenTrial) -> FrozenTrial:
        return self.simulation.storage.get_trial(trial_id_of(held.trial))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), who=st.integers(0, 2))
    def tell_from_elsewhere(self, which: int, who: int) -> None:
        held, process = self.one(which), self.processes[who]
        with self.simulation.acting_as(process), self.faults_allowed():
            process.study.tell(held.trial.number, 0.75)
        if self.row_of(held).state.is_finished():
            self.open.remove(held)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9))
    def forget(self, which: int) -> None:
        held = self.one(which)
        self.lost.add(held.trial.number)
        self.open.remove(held)

    @rule(who=st.integers(0, 2))
    def die(self, who: int) -> None:
        process = self.processes[who]
        machine = process.name.machine
        self.lost |= {each.trial.number for each in self.open if each.process is process}
        self.open = [each for each in self.open if each.process is not process]
        self.simulation.kill(process)
        # In its place, so that the others keep theirs.
        self.start(machine)
        self.processes.insert(who, self.processes.pop())

    @rule(places=st.lists(unit, min_size=1, max_size=4))
    def enqueue(self, places: list[float]) -> None:
        pairs = zip(self.space, places, strict=False)
        params = {f"p{i}": value_at(each[0], place) for i, (each, place) in enumerate(pairs)}
        with self.faults_allowed():
            self.processes[0].study.enqueue_trial(params)

    @precondition(lambda self: any(row.state == TrialState.FAIL for row in self.rows()))
    @rule(which=st.integers(0, 9))
    def retry(self, which: int) -> None:
        """Enqueue a failed trial again, as Optuna's RetryFailedTrialCallback does."""
        failed = [row for row in self.rows() if row.state == TrialState.FAIL]
        row = failed[which % len(failed)]
        again = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=row.params,
            distributions=row.distributions,
            user_attrs=row.user_attrs,
            system_attrs={**row.system_attrs, "fixed_params": row.params},
        )
        with self.faults_allowed():
            self.processes[0].study.add_trial(again)

    @rule(writes=st.integers(0, 25), error=st.sampled_from(FAULTS))
    def fail_a_write(self, writes: int, error: type[Exception]) -> None:
        self.simulation.fault.set(writes, error)

    @rule(
        who=st.integers(0, 2),
        trials=st.integers(1, 3),
        end=st.sampled_from(["value", "value", "nan", "prune", "raise"]),
        memory=st.integers(1, 7),
    )
    def optimize(self, who: int, trials: int, end: str, memory: int) -> None:
        process = self.processes[who]

        def objective(trial: optuna.Trial) -> float:
            self.suggest_some(OpenTrial(process, trial, 0.0), len(self.space))
            process.metering.tree.memory = memory * 0.9 * GIB
            process.metering.tree.cpu_time = (process.metering.tree.cpu_time or 0.0) + 2.5
            self.note_memory(process)
            process.metering.advance(0.0)
            check(trial)
            if end == "prune":
                raise optuna.TrialPruned
            if end == "raise":
                raise ValueError("no")
            return math.nan if end == "nan" else 0.5

        before = {row.number for row in self.rows() if row.state == TrialState.RUNNING}
        for each in self.open:
            each.steady = each.steady and each.process is not process
        with self.simulation.acting_as(process), self.faults_allowed():
            try:
                process.study.optimize(objective, n_trials=trials, catch=(ValueError,))
            except QuotaExhausted:
                pass
            except WouldWait:
                assert self.open or self.lost
            except AssertionError as error:
                # Optuna asserts that the row it could not finish is finished.
                assert self.simulation.fault.fired and "Should not reach" in str(error)
        if self.simulation.fault.fired:
            running = {row.number for row in self.rows() if row.state == TrialState.RUNNING}
            self.lost |= running - before


def test_a_few_interleavings() -> None:
    run_state_machine_as_test(Interleavings, settings=interleavings(3))


@pytest.mark.slow
def test_many_interleavings() -> None:
    run_state_machine_as_test(Interleavings, settings=interleavings(30))


def interleavings(examples: int) -> settings:
    """Return settings under which every run tries the same."""
    return settings(
        max_examples=examples,
        stateful_step_count=25,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
