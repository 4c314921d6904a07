"""`check`: multi-objective, ask-and-tell, distributed and wrapped trials."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
import os
import socket
import time
from typing import Any
import warnings

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

from optuna_quota import check, isolated, LimitBreached, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._records import read_record


NONE = Limits(wall_time=1e-6)
STUDIES = {
    "pruner": lambda **kw: optuna.create_study(pruner=QuotaPruner(limits=NONE), **kw),
    "sampler": lambda **kw: optuna.create_study(
        sampler=QuotaSampler(RandomSampler(), quota=Quota(n_trials=9), limits=NONE), **kw
    ),
    "both": lambda **kw: optuna.create_study(
        sampler=QuotaSampler(RandomSampler(), quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=NONE),
        **kw,
    ),
}


@pytest.mark.parametrize("which", STUDIES)
def test_a_multi_objective_trial_is_terminated(which: str) -> None:
    study = STUDIES[which](directions=["minimize", "maximize"])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        check(trial)
        raise AssertionError("not terminated")

    study.optimize(objective, n_trials=2)
    for trial in study.trials:
        assert trial.state == TrialState.PRUNED
        if which != "pruner":
            assert read_record(trial).outcome == "terminated"


@pytest.mark.parametrize("which", STUDIES)
def test_ask_and_tell(which: str) -> None:
    study = STUDIES[which]()
    trial = study.ask()
    with pytest.raises(LimitBreached) as caught:
        check(trial)
    assert caught.value.resource == "wall_time"
    assert caught.value.limit == 1e-6
    assert caught.value.observed is not None and caught.value.observed > 1e-6
    assert caught.value.seconds is not None
    study.tell(trial, state=TrialState.PRUNED)
    if which != "pruner":
        record = read_record(study.trials[0])
        assert record.outcome == "terminated"
        assert record.reason is not None and record.reason.startswith(str(caught.value)[:30])


@pytest.mark.parametrize("given", [None, 1, "trial", optuna.create_study()])
def test_what_is_no_trial_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="`trial` must be an Optuna trial but got"):
        check(given)


def test_trials_without_a_study_or_limits_are_not_checked() -> None:
    check(optuna.trial.FixedTrial({"x": 1}))
    check(optuna.create_study().ask())
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(memory="1TiB")),
    )
    check(study.ask())


def in_two_processes(rank: int, port: int, results: Any) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name, scenario in DISTRIBUTED.items():
            results.put((name, rank, *scenario(rank)))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    results.close()
    results.join_thread()
    # Torch's own threads sometimes abort an interpreter that exits.
    os._exit(0)


def checks_distributed(trial: optuna.Trial | None) -> tuple[str, float | None]:
    """Check in both processes until either raises; return what was raised, and the limit."""
    from optuna_integration import TorchDistributedTrial

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        distributed = TorchDistributedTrial(trial)
    try:
        for _ in range(50):
            check(distributed)
            time.sleep(0.01)
    except Exception as error:  # noqa: BLE001 - which one is what is asked for
        return type(error).__name__, getattr(error, "limit", None)
    return "completed", None


def over_a_limit(rank: int) -> tuple[str, float | None]:
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(wall_time=0.3)),
    )
    return checks_distributed(study.ask() if rank == 0 else None)


def within_its_limits(rank: int) -> tuple[str, float | None]:
    study = optuna.create_study(pruner=QuotaPruner(limits=Limits(wall_time="1h")))
    return checks_distributed(study.ask() if rank == 0 else None)


def without_limits(rank: int) -> tuple[str, float | None]:
    return checks_distributed(optuna.create_study().ask() if rank == 0 else None)


def fails_at_rank_0(rank: int) -> tuple[str, float | None]:
    class Faulty(QuotaPruner):
        def watch_trial(self, study: Any, trial: Any) -> Any:
            raise KeyError(lambda: "can't be pickled")

    study = optuna.create_study(pruner=Faulty(limits=Limits(wall_time="1h")))
    return checks_distributed(study.ask() if rank == 0 else None)


DISTRIBUTED: dict[str, Callable[[int], tuple[str, float | None]]] = {
    "over a limit": over_a_limit,
    "within its limits": within_its_limits,
    "without limits": without_limits,
    "fails at rank 0": fails_at_rank_0,
}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("torch") is None or find_spec("optuna_integration") is None,
    reason="torch or optuna-integration is not installed",
)
def test_all_processes_of_a_distributed_trial_agree() -> None:
    import torch.multiprocessing as mp

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    results = mp.get_context("spawn").Queue()
    mp.spawn(in_two_processes, args=(port, results), nprocs=2)
    found = {results.get(timeout=10) for _ in range(2 * len(DISTRIBUTED))}
    assert found == {
        ("over a limit", 0, "LimitBreached", 0.3),
        ("over a limit", 1, "LimitBreached", 0.3),
        ("within its limits", 0, "completed", None),
        ("within its limits", 1, "completed", None),
        ("without limits", 0, "completed", None),
        ("without limits", 1, "completed", None),
        ("fails at rank 0", 0, "KeyError", None),
        ("fails at rank 0", 1, "RuntimeError", None),
    }


class Wrapper(optuna.trial.BaseTrial):
    """A wrapper with none of the trial's own methods."""

    def __init__(self, inner: Any) -> None:
        self.cached = optuna.trial.create_trial(value=1.0)
        self.inner = inner

    def _suggest(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    suggest_float = suggest_int = suggest_categorical = _suggest
    suggest_uniform = suggest_loguniform = suggest_discrete_uniform = _suggest
    report = set_user_attr = set_system_attr = set_constraint = should_prune = _suggest
    number = params = distributions = user_attrs = constraints = datetime_start = None
    # Optuna 4 has it.
    system_attrs = None


class Delegate:
    """A wrapper with all of the trial's attributes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, Delegate, lambda t: Wrapper(Wrapper(t)), lambda t: Wrapper(Delegate(Wrapper(t)))],
)
def test_a_wrapped_trial_is_checked(wrap: Callable[[Any], Any]) -> None:
    pruner = QuotaPruner(limits=Limits(wall_time=1e-6))
    for sampler in (None, QuotaSampler(quota=Quota(n_trials=9))):
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        trial = study.ask()
        with pytest.raises(LimitBreached):
            check(wrap(trial))
        study.tell(trial, state=TrialState.PRUNED)


def test_an_isolated_trial_is_checked_inside_of_a_wrapper() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=9)),
        pruner=QuotaPruner(limits=Limits(wall_time=0.4)),
    )

    def objective(trial: optuna.Trial) -> float:
        wrapped = Wrapper(trial)
        while True:
            check(wrapped)
            time.sleep(0.02)

    study.optimize(isolated(objective), n_trials=1)
    assert read_record(study.trials[0]).outcome == "terminated"
