"""The protocol over all interleavings of three workers, with a crash at any step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest

from optuna_quota._ledger.protocol import Claim, decide, Decision, ResourceRequest
from tests.ledger_tests import protocol_model
from tests.ledger_tests.protocol_model import cyclic, ENDS, explore, Graph, Model, State


def one(resource: str, least: float, most: float | None = None) -> Mapping[str, ResourceRequest]:
    return {resource: ResourceRequest(least, most or least)}


MODELS = {
    "a count that two of three fit into": Model((one("n_trials", 1),) * 3, {"n_trials": 2}),
    "a count that one of three fits into": Model((one("n_trials", 1),) * 3, {"n_trials": 1}),
    "a footprint each": Model(
        (one("cpu_time", 6), one("cpu_time", 5), one("cpu_time", 4)), {"cpu_time": 10}
    ),
    "slices": Model((one("cpu_time", 1, 6),) * 3, {"cpu_time": 8}),
    "slices that are extended": Model(
        (one("cpu_time", 1, 3),) * 3,
        {"cpu_time": 8},
        more=(one("cpu_time", 4, 5),) * 3,
    ),
    "memory held at one moment": Model(
        (one("memory", 6), one("memory", 5), one("memory", 4)), {"memory": 10}
    ),
    "memory that grows": Model(
        (one("memory", 3),) * 3, {"memory": 10}, more=(one("memory", 6),) * 3
    ),
    "two resources at once": Model(
        (
            {"memory": ResourceRequest(6, 6), "n_trials": ResourceRequest(1, 1)},
            {"memory": ResourceRequest(6, 6), "n_trials": ResourceRequest(1, 1)},
            {"memory": ResourceRequest(4, 4), "n_trials": ResourceRequest(1, 1)},
        ),
        {"memory": 10, "n_trials": 2},
    ),
}


LARGE = ("slices that are extended", "memory that grows")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in MODELS]


@cache
def graph_of(name: str) -> Graph:
    return explore(MODELS[name])


def total(state: State, resource: str) -> float:
    workers, used = state
    held = sum(dict(worker.granted).get(resource, 0.0) for worker in workers)
    return dict(used).get(resource, 0.0) + held


@pytest.mark.parametrize("name", NAMES)
def test_in_every_interleaving_the_quota_holds_and_every_trial_ends(name: str) -> None:
    model = MODELS[name]
    graph = graph_of(name)
    for state, steps in graph.items():
        for resource, quota in model.quota.items():
            assert total(state, resource) <= quota + 1e-9, state
        # No deadlock: each worker has ended, or at least one can take a step.
        assert steps or all(worker.phase in ENDS for worker in state[0]), state
    # No livelock: any sequence of steps ends. With the above, whatever is
    # scheduled, at least one progresses until all are done: no worker starves.
    assert not cyclic(graph)


@pytest.mark.parametrize("name", NAMES)
def test_no_trial_is_refused_while_there_is_room(name: str) -> None:
    model = MODELS[name]
    for state in graph_of(name):
        for i, worker in enumerate(state[0]):
            if worker.phase == "refused":
                assert any(
                    total(state, resource) + want.least > model.quota[resource]
                    for resource, want in model.wants[i].items()
                ), state


def test_every_trial_runs_that_fits_after_the_others() -> None:
    graph = graph_of("memory held at one moment")
    ends = [state for state, steps in graph.items() if not steps]
    assert ends
    for workers, _ in ends:
        assert all(worker.phase in ("finished", "failed") for worker in workers)


def test_the_search_finds_the_overshoot_of_a_protocol_that_ignores_claims(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def careless(
        me: Claim,
        wants: Mapping[str, ResourceRequest],
        claims: list[Claim],
        used: Mapping[str, float],
        quota: Mapping[str, float],
        *,
        queue: bool,
    ) -> Decision:
        firm = [Claim(c.number, c.machine, c.granted) for c in claims]
        return decide(me, wants, firm, used, quota, queue=queue)

    monkeypatch.setattr(protocol_model, "decide", careless)
    model = MODELS["a count that one of three fits into"]
    assert any(total(state, "n_trials") > 1 for state in explore(model))


def test_the_search_finds_the_deadlock_of_a_protocol_in_which_no_trial_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stubborn(
        me: Claim,
        wants: Mapping[str, ResourceRequest],
        claims: list[Claim],
        used: Mapping[str, float],
        quota: Mapping[str, float],
        *,
        queue: bool,
    ) -> Decision:
        decision = decide(me, wants, claims, used, quota, queue=queue)
        asks = bool(me.asked) and any(c.asked for c in claims if c.number != me.number)
        if decision.action == "withdraw" and asks:
            return Decision("wait", shortage=decision.shortage)
        return decision

    monkeypatch.setattr(protocol_model, "decide", stubborn)
    graph = explore(MODELS["a count that one of three fits into"])
    stuck = [s for s, steps in graph.items() if {n for n, _ in steps} <= {"crash", "fail"}]
    assert any(any(w.phase == "read" for w in workers) for workers, _ in stuck)


@pytest.mark.parametrize(
    ("claims", "action", "granted"),
    [
        ([], "grant", 6),
        ([Claim(0, granted={"cpu_time": 4})], "grant", 6),
        ([Claim(0, granted={"cpu_time": 7})], "grant", 3),
        ([Claim(0, granted={"cpu_time": 9})], "withdraw", None),
        ([Claim(0, asked={"cpu_time": 9})], "withdraw", None),
        ([Claim(2, asked={"cpu_time": 9})], "wait", None),
        ([Claim(2, granted={"cpu_time": 9})], "withdraw", None),
        ([Claim(0, queued_for={"cpu_time": 9})], "withdraw", None),
        ([Claim(2, queued_for={"cpu_time": 9})], "grant", 6),
    ],
)
def test_a_decision_by_what_others_hold_ask_and_wait_for(
    claims: list[Claim], action: str, granted: float | None
) -> None:
    found = decide(Claim(1), {"cpu_time": ResourceRequest(2, 6)}, claims, {}, {"cpu_time": 10})
    assert found.action == action
    assert found.granted.get("cpu_time") == granted
    assert (found.shortage is None) == (action == "grant")


def test_held_resources_count_by_machine() -> None:
    others = [Claim(0, "there", granted={"memory": 9})]
    wants = {"memory": ResourceRequest(5, 5)}
    assert decide(Claim(1, "here"), wants, others, {}, {"memory": 10}).action == "grant"
    assert decide(Claim(1, "there"), wants, others, {}, {"memory": 10}).action == "withdraw"


def test_a_running_trial_goes_before_those_that_wait() -> None:
    waiting = [Claim(0, queued_for={"cpu_time": 9})]
    me, wants = Claim(1, granted={"cpu_time": 2}), {"cpu_time": ResourceRequest(3, 5)}
    assert decide(me, wants, waiting, {}, {"cpu_time": 10}, queue=False).action == "grant"
    assert decide(me, wants, waiting, {}, {"cpu_time": 10}).action == "withdraw"
