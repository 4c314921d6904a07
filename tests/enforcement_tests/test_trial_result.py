"""The outcome and reason in a trial's row, however it ends."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState
import pytest

from optuna_quota import check, isolated, LimitBreached, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._enforcement.trial_result import classify_end
from optuna_quota._metering import Verdict
from optuna_quota._optuna import TellCall
from optuna_quota._records import read_record
from optuna_quota._usage import Breach


BREACH = Breach("memory", 100, 150, 2.0)
STOPPED = Verdict("terminated", "Too much memory.", BREACH)
PRUNED = Verdict("pruned", "MedianPruner pruned it at step 3.")
REJECTED = Verdict("rejected", "It would not fit.")
COMPLETE, FAIL = TrialState.COMPLETE, TrialState.FAIL


@pytest.mark.parametrize(
    ("arguments", "outcome", "reason"),
    [
        ({"state": COMPLETE}, "completed", None),
        ({"state": COMPLETE, "verdict": PRUNED}, "completed", None),
        (
            {"state": COMPLETE, "breach": BREACH},
            "completed",
            f"{BREACH.reason} The objective completed before it could be stopped.",
        ),
        (
            {"state": COMPLETE, "verdict": STOPPED, "breach": BREACH},
            "completed",
            "Too much memory. The objective caught the stop and returned a value.",
        ),
        (
            {"state": COMPLETE, "verdict": REJECTED},
            "completed",
            "It would not fit. The objective caught the stop and returned a value.",
        ),
        ({"state": TrialState.PRUNED}, "pruned", "The objective pruned itself."),
        ({"state": TrialState.PRUNED, "verdict": PRUNED}, "pruned", PRUNED.reason),
        ({"state": TrialState.PRUNED, "verdict": STOPPED}, "terminated", STOPPED.reason),
        (
            {"state": TrialState.PRUNED, "tell_call": TellCall(True, TrialState.PRUNED)},
            "pruned",
            "Ended by study.tell(state=PRUNED).",
        ),
        (
            {"state": FAIL, "tell_call": TellCall(True, FAIL)},
            "failed",
            "Ended by study.tell(state=FAIL).",
        ),
        (
            {"state": FAIL, "tell_call": TellCall(True, None, "nan")},
            "failed",
            "study.tell was given no valid value: nan.",
        ),
        (
            {
                "state": FAIL,
                "tell_call": TellCall(False, None, "The value nan is not acceptable."),
            },
            "failed",
            "The objective returned no valid value: The value nan is not acceptable.",
        ),
        ({"state": FAIL}, "failed", "The objective returned no valid value."),
        (
            {"state": FAIL, "error": ValueError("x"), "tell_call": TellCall(False, FAIL)},
            "failed",
            "The objective raised ValueError: x.",
        ),
        (
            {
                "state": FAIL,
                "error": OSError(f"In a worker:\n{'x' * 999}\n{'y' * 187}\nNo space."),
            },
            "failed",
            f"The objective raised OSError: In a worker: {'x' * 87} … xx {'y' * 187} No space.",
        ),
        (
            {"state": FAIL, "error": ValueError("x"), "verdict": STOPPED},
            "terminated",
            "Too much memory. The objective raised ValueError: x.",
        ),
        (
            {"state": FAIL, "error": ValueError("x"), "verdict": PRUNED},
            "failed",
            "MedianPruner pruned it at step 3. The objective raised ValueError: x.",
        ),
        (
            {"state": FAIL, "verdict": STOPPED, "tell_call": TellCall(True, FAIL)},
            "terminated",
            "Too much memory. Ended by study.tell(state=FAIL).",
        ),
        (
            {"state": FAIL, "error": ValueError("x"), "verdict": Verdict("failed", "Killed.")},
            "failed",
            "Killed.",
        ),
    ],
)
def test_outcome_and_reason(arguments: Any, outcome: str, reason: str | None) -> None:
    end = classify_end(**arguments)
    assert (end.outcome, end.reason) == (outcome, reason)


def study_with(pruner: BasePruner | None = None) -> optuna.Study:
    return optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=99)), pruner=pruner)


@pytest.mark.parametrize(
    ("tell", "outcome", "reason"),
    [
        ({"state": FAIL}, "failed", "Ended by study.tell(state=FAIL)."),
        ({"state": TrialState.PRUNED}, "pruned", "Ended by study.tell(state=PRUNED)."),
        ({"values": 1.0}, "completed", None),
        ({"values": 1.0, "state": COMPLETE}, "completed", None),
        ({"values": float("nan")}, "failed", "study.tell was given no valid value: nan."),
        ({"values": None}, "failed", "study.tell was given no valid value: None."),
        ({"values": [1.0, 2.0]}, "failed", "study.tell was given no valid value: [1.0, 2.0]."),
    ],
)
@pytest.mark.filterwarnings("ignore:The value:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of the values:UserWarning")
def test_tell_by_the_user(tell: Any, outcome: str, reason: str | None) -> None:
    study = study_with()
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, **tell)
    record = read_record(study.trials[0])
    assert (record.outcome, record.reason) == (outcome, reason)


def test_tell_inside_another_studys_objective() -> None:
    outer, inner = study_with(), study_with()

    def objective(trial: optuna.Trial) -> float:
        inner.tell(inner.ask(), state=FAIL)
        return 0.0

    outer.optimize(objective, n_trials=1)
    assert read_record(inner.trials[0]).reason == "Ended by study.tell(state=FAIL)."
    assert read_record(outer.trials[0]).outcome == "completed"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "The objective returned no valid value: The value None could not be cast"),
        (float("nan"), "The objective returned no valid value: The value nan is not acceptable"),
        ("text", "The objective returned no valid value: "),
    ],
)
def test_an_objective_that_returns_no_value(value: Any, reason: str) -> None:
    study = study_with()
    study.optimize(lambda trial: value, n_trials=1)
    record = read_record(study.trials[0])
    assert record.outcome == "failed"
    assert record.reason is not None and record.reason.startswith(reason)


def swallows_and(act: Callable[[], Any]) -> Callable[[optuna.Trial], Any]:
    def objective(trial: optuna.Trial) -> Any:
        try:
            while True:
                time.sleep(0.01)
                check(trial)
        except BaseException:  # noqa: BLE001 - as careless as objectives are
            return act()

    return objective


def fail() -> None:
    raise RuntimeError("interrupted")


def prune() -> None:
    raise optuna.TrialPruned


IGNORED = "The objective caught the stop and returned a value."


@pytest.mark.parametrize(
    ("act", "state", "outcome", "ending"),
    [
        (lambda: 1.0, COMPLETE, "completed", IGNORED),
        (lambda: None, FAIL, "terminated", "The value None could not be cast to float."),
        (fail, FAIL, "terminated", "The objective raised RuntimeError: interrupted."),
        (prune, TrialState.PRUNED, "terminated", ""),
    ],
)
def test_an_objective_that_swallows_the_stop(
    act: Callable[[], Any], state: TrialState, outcome: str, ending: str
) -> None:
    study = study_with(QuotaPruner(limits=Limits(wall_time=0.05)))
    study.optimize(swallows_and(act), n_trials=1, catch=RuntimeError)
    (trial,) = study.trials
    record = read_record(trial)
    assert (trial.state, record.outcome) == (state, outcome)
    assert record.breach is not None and record.breach.resource == "wall_time"
    assert record.reason is not None and record.reason.startswith("Time limit")
    assert record.reason.endswith(ending)


def test_an_isolated_objective_that_swallows_the_stop_is_terminated() -> None:
    study = study_with(QuotaPruner(limits=Limits(wall_time=0.4)))

    def objective(trial: optuna.Trial) -> float:
        try:
            time.sleep(20)
        except BaseException:  # noqa: BLE001 - as careless as objectives are
            return 1.0
        return 2.0

    study.optimize(isolated(objective), n_trials=1)
    record = read_record(study.trials[0])
    assert study.trials[0].state == TrialState.PRUNED
    assert record.outcome == "terminated"


def test_ask_and_tell_with_a_failure_after_a_breach() -> None:
    study = study_with(QuotaPruner(limits=Limits(wall_time=0.01)))
    trial = study.ask()
    time.sleep(0.02)
    with pytest.raises(LimitBreached):
        check(trial)
    study.tell(trial, state=FAIL)
    record = read_record(study.trials[0])
    assert record.outcome == "terminated"
    assert record.reason is not None and record.reason.endswith("study.tell(state=FAIL).")


def test_an_objective_that_fails_when_it_is_pruned() -> None:
    class Always(BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return True

    study = study_with(QuotaPruner(Always(), limits=Limits(wall_time="1h")))

    def objective(trial: optuna.Trial) -> float:
        trial.report(0.0, 3)
        assert trial.should_prune()
        raise ValueError("no checkpoint")

    study.optimize(objective, n_trials=1, catch=ValueError)
    record = read_record(study.trials[0])
    assert record.outcome == "failed"
    assert record.reason == (
        "Always pruned it at step 3. The objective raised ValueError: no checkpoint."
    )


def test_an_objective_that_swallows_the_rejection() -> None:
    study = optuna.create_study(sampler=QuotaSampler(quota=Quota(n_trials=1)))

    def objective(trial: optuna.Trial) -> float:
        try:
            return trial.suggest_float("x", 0, 1)
        except Exception:  # noqa: BLE001 - as careless as objectives are
            return 0.0

    study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=3)
    record = read_record(study.trials[-1])
    assert len(study.trials) == 2
    assert study.trials[-1].state == COMPLETE
    assert record.outcome == "rejected"
    assert record.reason is not None and record.reason.endswith(IGNORED)
