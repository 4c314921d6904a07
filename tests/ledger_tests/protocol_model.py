"""An explicit-state model of workers that follow the ledger's protocol.

Every step of a worker is one access to the storage: it writes its row, or reads all rows and
decides by them. Any worker may crash after any step; any other may notice and fail its row. What
is decided and written comes from the ledger's own functions; the model adds the order of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from optuna_quota._ledger.grant import refuse_never_fitting
from optuna_quota._ledger.protocol import (
    Claim,
    decide,
    Decision,
    ResourceRequest,
    with_claim,
    with_decision,
    with_queue_place,
)
from optuna_quota._resources import HELD_RESOURCES


Amounts = tuple[tuple[str, float], ...]

# The next step of a worker: "ask" writes its claim, "read" reads, "write" writes the decision,
# "look" reads from the queue, "run" has been granted and may finish or extend.
ENDS = ("finished", "refused", "failed")


@dataclass(frozen=True)
class Worker:
    phase: str = "ask"
    crashed: bool = False
    granted: Amounts = ()
    asked: Amounts = ()
    queued_for: Amounts = ()
    decision: str = ""
    grants: Amounts = ()
    extended: bool = False


State = tuple[tuple[Worker, ...], Amounts]


def freeze(amounts: Mapping[str, float]) -> Amounts:
    return tuple(sorted(amounts.items()))


@dataclass(frozen=True)
class Model:
    """Workers with one trial each, a quota, and what the trials request while they run."""

    wants: tuple[Mapping[str, ResourceRequest], ...]
    quota: Mapping[str, float]
    more: tuple[Mapping[str, ResourceRequest], ...] = ()

    def start(self) -> State:
        return tuple(Worker() for _ in self.wants), ()

    def claim(self, number: int, worker: Worker) -> Claim:
        return Claim(
            number, "here", dict(worker.granted), dict(worker.asked), dict(worker.queued_for)
        )

    def claims(self, state: State) -> list[Claim]:
        return [self.claim(i, w) for i, w in enumerate(state[0]) if w.phase not in ENDS]

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        for i, worker in enumerate(state[0]):
            if worker.phase in ENDS:
                continue
            if worker.crashed:
                yield "fail", self._end(state, i, "failed")
                continue
            yield from self._moves(state, i, worker)
            yield "crash", self._put(state, i, replace(worker, crashed=True))

    def _moves(self, state: State, i: int, worker: Worker) -> Iterator[tuple[str, State]]:
        wants = self.more[i] if worker.phase.startswith("more") else self.wants[i]
        queue = not worker.phase.startswith("more")
        kind = "" if queue else "more "
        phase = worker.phase.removeprefix("more ")
        row = self.claim(i, worker)
        if phase == "ask":
            yield (
                "ask",
                self._put(state, i, self._row(worker, with_claim(row, wants), kind + "read")),
            )
        elif phase == "read":
            decision = self._decide(state, row, wants, queue=queue)
            if decision.action == "wait":
                return
            after = replace(
                worker,
                phase=kind + "write",
                decision=decision.action,
                grants=freeze(decision.granted),
            )
            yield "read", self._put(state, i, after)
        elif phase == "write":
            yield from self._write(state, i, worker, row, kind)
        elif phase == "look":
            yield from self._look(state, i, worker, row)
        elif phase == "run":
            yield "finish", self._end(state, i, "finished")
            if self.more and not worker.extended:
                yield (
                    "extend",
                    self._put(state, i, replace(worker, phase="more ask", extended=True)),
                )

    def _write(
        self, state: State, i: int, worker: Worker, row: Claim, kind: str
    ) -> Iterator[tuple[str, State]]:
        decision = Decision(worker.decision, dict(worker.grants))  # type: ignore[arg-type]
        granted = decision.action == "grant"
        phase = "run" if granted or kind else "queue"
        after = self._row(worker, with_decision(row, decision), phase)
        after = replace(after, decision="", grants=())
        if phase == "queue":
            # The ledger writes its place in the queue in a step of its own.
            after = replace(after, phase="look")
            if not worker.queued_for:
                yield "withdraw", self._put(state, i, replace(after, phase="place"))
                return
        yield "grant" if granted else "withdraw", self._put(state, i, after)

    def _look(
        self, state: State, i: int, worker: Worker, row: Claim
    ) -> Iterator[tuple[str, State]]:
        decision = self._decide(state, row, self.wants[i], queue=True)
        if decision.action == "withdraw":
            assert decision.shortage is not None
            if refuse_never_fitting(decision.shortage) is not None:
                yield "refuse", self._end(state, i, "refused")
            return
        yield "look", self._put(state, i, replace(worker, phase="ask"))

    def place(self, state: State) -> Iterator[tuple[str, State]]:
        for i, worker in enumerate(state[0]):
            if worker.phase == "place" and not worker.crashed:
                row = with_queue_place(self.claim(i, worker), self.wants[i])
                yield "place", self._put(state, i, self._row(worker, row, "look"))

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        yield from self.steps(state)
        yield from self.place(state)

    def _decide(
        self, state: State, row: Claim, wants: Mapping[str, ResourceRequest], *, queue: bool
    ) -> Decision:
        return decide(row, wants, self.claims(state), dict(state[1]), self.quota, queue=queue)

    def _row(self, worker: Worker, row: Claim, phase: str) -> Worker:
        return replace(
            worker,
            phase=phase,
            granted=freeze(row.granted),
            asked=freeze(row.asked),
            queued_for=freeze(row.queued_for),
        )

    def _put(self, state: State, i: int, worker: Worker) -> State:
        workers = list(state[0])
        workers[i] = worker
        return tuple(workers), state[1]

    def _end(self, state: State, i: int, phase: str) -> State:
        used = dict(state[1])
        for name, amount in state[0][i].granted:
            if name not in HELD_RESOURCES:
                used[name] = used.get(name, 0.0) + amount
        workers, _ = self._put(state, i, Worker(phase=phase))
        return workers, freeze(used)


Graph = dict[State, list[tuple[str, State]]]


def explore(model: Model) -> Graph:
    """Return all states that can be reached, each with its steps."""
    graph: Graph = {}
    todo = [model.start()]
    while todo:
        state = todo.pop()
        if state not in graph:
            graph[state] = list(model.successors(state))
            todo.extend(after for _, after in graph[state])
    return graph


def cyclic(graph: Graph) -> set[State]:
    """Return states on cycles or leading to one: what is left after removing dead ends."""
    before: dict[State, list[State]] = {state: [] for state in graph}
    out = {state: len(steps) for state, steps in graph.items()}
    for state, steps in graph.items():
        for _, after in steps:
            before[after].append(state)
    ends = [state for state, count in out.items() if count == 0]
    left = set(graph)
    while ends:
        state = ends.pop()
        left.discard(state)
        for earlier in before[state]:
            out[earlier] -= 1
            if out[earlier] == 0:
                ends.append(earlier)
    return left
