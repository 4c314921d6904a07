"""Refused points and their replacements, with every kind of base sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
import json
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState
import pytest

from optuna_quota import (
    Footprint,
    LimitBreached,
    Limits,
    Quota,
    QuotaPruner,
    QuotaSampler,
    Strategy,
    Usage,
)
from optuna_quota._footprint.observations import read_observation
from optuna_quota._sampler.candidates import OnVeto, replacement_for


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(level)


class Work:
    """A meter of the usage that the objective reports."""

    name = "work"
    peak = True
    now = 0.0

    def read(self, pids: Sequence[int]) -> float:
        return self.now


LIMIT = 2_000.0
GRID = {"x": [1, 10, 100, 1000], "y": [1, 10, 100], "kind": ["a", "b"]}


def work_of(params: dict[str, Any]) -> float:
    factor = 2 if params.get("kind") == "b" else 1
    return float(100 + params["x"] * params["y"] * factor)


def run_study(
    base: BaseSampler,
    n_trials: int,
    *,
    enqueued: Sequence[dict[str, Any]] = (),
    conditional: bool = False,
    **arguments: Any,
) -> optuna.Study:
    meter = Work()

    def objective(trial: optuna.Trial) -> float:
        if conditional and trial.suggest_categorical("kind", ["none", "b"]) == "none":
            return 0.0
        x = trial.suggest_int("x", 1, 1000, log=True)
        y = trial.suggest_int("y", 1, 100, log=True)
        if not conditional:
            trial.suggest_categorical("kind", ["a", "b"])
        meter.now = work_of(trial.params)
        if meter.now > LIMIT:
            raise LimitBreached("over", resource="work")
        return -float(x * y)

    study = optuna.create_study(
        sampler=QuotaSampler(
            base,
            quota=Quota(n_trials=1_000),
            limits=Limits(custom={"work": LIMIT}),
            meters=[meter],
            **arguments,
        )
    )
    for params in enqueued:
        study.enqueue_trial(params)

    def reset(study: optuna.Study, trial: FrozenTrial) -> None:
        meter.now = 0.0

    study.optimize(objective, n_trials=n_trials, callbacks=[reset])
    return study


def exact(params: dict[str, Any]) -> Usage:
    return Usage(custom={"work": work_of(params)})


def breaches(study: optuna.Study) -> list[int]:
    return [t.number for t in study.trials if t.user_attrs["quota:outcome"] == "terminated"]


def actions(study: optuna.Study) -> Counter[str]:
    notes = (t.user_attrs.get("quota:proposed") for t in study.trials)
    return Counter(note["action"] for note in notes if note)


NEEDS_TORCH = pytest.mark.skipif(
    find_spec("torch") is None, reason="GPSampler needs torch: install the extra `integrations`"
)


@pytest.mark.parametrize(
    "base",
    [
        RandomSampler(seed=1),
        TPESampler(seed=1),
        pytest.param(TPESampler(seed=1, multivariate=False), marks=pytest.mark.slow),
        pytest.param(TPESampler(seed=1, multivariate=True, group=True), marks=pytest.mark.slow),
        pytest.param(CmaEsSampler(seed=1), marks=pytest.mark.slow),
        CmaEsSampler(seed=1, with_margin=True),
        pytest.param(NSGAIISampler(seed=1, population_size=10), marks=pytest.mark.slow),
        pytest.param(QMCSampler(seed=1), marks=pytest.mark.slow),
        pytest.param(
            GPSampler(seed=1), marks=[pytest.mark.slow, pytest.mark.integration, NEEDS_TORCH]
        ),
    ],
    ids=lambda base: type(base).__name__,
)
def test_few_breaches_after_the_first_trials(base: BaseSampler) -> None:
    study = run_study(base, 20)
    assert len([n for n in breaches(study) if n >= 11]) <= 1
    assert sum(actions(study).values()) > 0
    outcomes = Counter(t.user_attrs["quota:outcome"] for t in study.trials)
    assert outcomes["completed"] + outcomes["terminated"] + outcomes["rejected"] == 20
    assert outcomes["rejected"] <= 2
    for trial in study.trials[8:]:
        footprint = trial.user_attrs["quota:footprint"]["work"]
        assert footprint["lower"] <= footprint["median"] <= footprint["upper"]


def enumerate_points(base: BaseSampler, **arguments: Any) -> optuna.Study:
    meter = Work()

    def objective(trial: optuna.Trial) -> float:
        for name, choices in GRID.items():
            trial.suggest_categorical(name, choices)
        meter.now = work_of(trial.params)
        if meter.now > LIMIT:
            raise LimitBreached("over", resource="work")
        return 0.0

    sampler = QuotaSampler(
        base,
        quota=Quota(n_trials=1_000),
        limits=Limits(custom={"work": LIMIT}),
        meters=[meter],
        footprint=lambda params: Usage(custom={"work": work_of(params)}),
        **arguments,
    )
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, callbacks=[lambda *_: setattr(meter, "now", 0.0)])
    assert len(study.trials) == 24
    outcomes = Counter(t.user_attrs["quota:outcome"] for t in study.trials)
    assert outcomes["completed"] == 15
    assert outcomes["rejected"] == 9 - outcomes["terminated"]
    assert actions(study) == {"rejected": outcomes["rejected"]}
    return study


@pytest.mark.parametrize("base", [GridSampler(GRID, seed=1), BruteForceSampler(seed=3)])
def test_enumerating_samplers_skip_refused_points_and_end(base: BaseSampler) -> None:
    space = {name: CategoricalDistribution(choices) for name, choices in GRID.items()}
    assert breaches(enumerate_points(base, strategy=Strategy(24, search_space=space))) == []


@pytest.mark.parametrize(
    "base",
    [GridSampler(GRID, seed=1), *(BruteForceSampler(seed=seed) for seed in (1, 3, 4))],
)
def test_a_point_is_not_refused_while_it_may_have_more_parameters(base: BaseSampler) -> None:
    study = enumerate_points(base)
    for number in breaches(study):
        trials = [t for t in study.trials[:number] if t.state == TrialState.COMPLETE]
        known = {name: {t.params[name] for t in trials} for name in ("x", "y")}
        # An integer may decide which parameters there are until two had the same ones.
        params = study.trials[number].params
        assert any(len(v) < 2 and params[name] not in v for name, v in known.items())


def test_the_refused_point_is_recorded_in_the_row() -> None:
    study = run_study(RandomSampler(seed=3), 16)
    trial = next(t for t in study.trials if "quota:proposed" in t.user_attrs)
    note = trial.user_attrs["quota:proposed"]
    assert note["action"] == "redrawn"
    assert note["resource"] == "work"
    assert note["limit"] == LIMIT
    assert note["median"] > LIMIT
    assert note["probability"] > 0.5
    assert set(note["params"]) == {"x", "y", "kind"}
    assert note["params"] != trial.params
    json.dumps(note, allow_nan=False)


def test_a_stated_footprint_decides_from_the_first_trial_on() -> None:
    study = run_study(
        RandomSampler(seed=2),
        15,
        footprint=lambda params: Usage(custom={"work": work_of(params)}),
    )
    assert not breaches(study)


@pytest.mark.slow
def test_a_footprint_of_an_earlier_study_decides_from_the_first_trial_on() -> None:
    earlier = run_study(RandomSampler(seed=5), 40, breach_probability=1)
    rows = [row for row in map(read_observation, earlier.trials) if row is not None]
    study = run_study(RandomSampler(seed=2), 15, footprint=Footprint.fit(rows))
    assert len(breaches(study)) <= 1
    assert len(breaches(earlier)) >= 8


def test_an_enqueued_point_that_cannot_fit_is_rejected_and_one_that_does_runs() -> None:
    points = [{"x": 900, "y": 90, "kind": "a"}, {"x": 2, "y": 3, "kind": "b"}]
    study = run_study(
        RandomSampler(seed=1),
        3,
        enqueued=points,
        footprint=lambda params: Usage(custom={"work": work_of(params)}),
    )
    first, second = study.trials[:2]
    assert first.user_attrs["quota:outcome"] == "rejected"
    assert first.state == optuna.trial.TrialState.PRUNED
    assert "projected, 2000 allowed" in first.user_attrs["quota:reason"]
    assert first.system_attrs["constraints"][0] > 0
    assert "quota:work" not in first.user_attrs
    assert second.params == points[1]
    assert second.user_attrs["quota:outcome"] == "completed"


@pytest.mark.slow
def test_conditional_parameters_are_judged_as_they_are_drawn() -> None:
    study = run_study(RandomSampler(seed=4), 36, conditional=True)
    assert len([n for n in breaches(study) if n >= 20]) <= 1
    kinds = Counter(t.params.get("kind") for t in study.trials)
    assert kinds["none"] and kinds["b"]


@pytest.mark.slow
def test_audits_run_refused_points() -> None:
    study = run_study(RandomSampler(seed=1), 20, audits=1.0)
    assert set(actions(study)) == {"audited"}
    assert len(breaches(study)) > 3


def test_an_audit_that_has_no_room_is_none() -> None:
    sampler = QuotaSampler(
        RandomSampler(seed=1),
        limits=Limits(memory="2GiB"),
        footprint=lambda params: Usage(memory=params["a"] * 2**30),
        audits=1.0,
    )
    study = optuna.create_study(sampler=sampler)
    for _ in range(20):
        trial = study.ask({"a": optuna.distributions.IntDistribution(1, 9)})
        if "quota:proposed" in study.trials[-1].user_attrs:
            break
        study.tell(trial, 1.0)
    candidates = sampler._session(study).candidates
    row = study.get_trials(deepcopy=False)[-1]
    candidates.set_left(study, row, {"wall_time": 1.0})
    # It is drawn and judged again, and the next refused point is audited instead.
    assert study.trials[-1].user_attrs["quota:proposed"] is None
    assert not candidates._state(row).is_audit
    assert candidates._n_audits == 0
    study.tell(trial, 1.0)


def test_without_a_limit_the_base_sampler_is_left_alone() -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("b", 0, 1) + trial.suggest_float("a", 0, 1)

    plain = optuna.create_study(sampler=TPESampler(seed=1))
    ours = optuna.create_study(sampler=QuotaSampler(TPESampler(seed=1), quota=Quota(n_trials=99)))
    for study in (plain, ours):
        study.optimize(objective, n_trials=20)
    assert [t.params for t in plain.trials] == [t.params for t in ours.trials]


def test_without_a_refusal_the_points_are_those_of_the_base_sampler() -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("b", 0, 1) + trial.suggest_float("a", 0, 1)

    quota, limits = Quota(n_trials=99), Limits(wall_time="1h")
    plain = optuna.create_study(sampler=RandomSampler(seed=1))
    ours = optuna.create_study(
        sampler=QuotaSampler(RandomSampler(seed=1), quota=quota, limits=limits)
    )
    for study in (plain, ours):
        study.optimize(objective, n_trials=20)
    assert [t.params for t in plain.trials] == [t.params for t in ours.trials]


def test_the_first_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        study = run_study(RandomSampler(seed=1), 16)
    finally:
        optuna.logging.disable_propagation()
    assert sum(actions(study).values()) > 1
    # Propagation may hand the same record to two handlers.
    (message,) = {r.getMessage() for r in caplog.records if r.name == "optuna.quota.sampler"}
    assert "refused; another one was drawn. Work limit likely exceeded: " in message


@pytest.mark.slow
def test_tpe_shares_the_point_that_runs() -> None:
    study = run_study(TPESampler(seed=1), 18, on_veto="nearest")
    assert actions(study)["moved"] > 0
    for trial in study.trials:
        pieces = {
            int(key.rpartition(":")[2]): value
            for key, value in trial.system_attrs.items()
            if key.startswith("tpe:relative_params:")
        }
        shared = json.loads("".join(pieces[i] for i in sorted(pieces)) or "{}")
        assert shared == {name: trial.params[name] for name in shared}


def test_a_rejected_row_has_all_parameters_of_its_point() -> None:
    study = run_study(TPESampler(seed=1, multivariate=True), 16, on_veto="skip")
    assert actions(study)["rejected"] > 0
    for trial in study.trials:
        assert set(trial.params) == {"x", "y", "kind"}
    space = optuna.search_space.intersection_search_space(study.trials, include_pruned=True)
    assert set(space) == {"x", "y", "kind"}


def test_a_constant_footprint_refuses_no_point() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(
            RandomSampler(seed=0), quota=Quota(n_trials=3), footprint=Usage(wall_time="1min")
        ),
        pruner=QuotaPruner(limits=Limits(wall_time="20s")),
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert [t.state for t in study.trials] == [optuna.trial.TrialState.COMPLETE] * 3
    assert study.trials[0].user_attrs["quota:footprint"]["wall_time"]["median"] == 60


@pytest.mark.slow
def test_a_stated_function_is_corrected_by_the_studys_trials() -> None:
    def far_too_little(params: dict[str, Any]) -> Usage:
        return Usage(custom={"work": work_of(params) / 1000})

    study = run_study(RandomSampler(seed=4), 40, footprint=far_too_little)
    # By itself the statement refuses nothing at all.
    assert sum(actions(study).values()) >= 3
    assert len([n for n in breaches(study) if n >= 16]) <= 2


@pytest.mark.parametrize("base", [RandomSampler, TPESampler])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_partially_fixed_parameters_are_kept_and_judged(
    base: type[BaseSampler], where: str
) -> None:
    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_int("x", 1, 10), trial.suggest_int("y", 1, 10)
        trial.set_user_attr("quota:work", work_of(trial.params))
        return float(x + y)

    def make(sampler: Any) -> BaseSampler:
        limits = Limits(custom={"work": 110.0})
        return QuotaSampler(
            sampler, quota=Quota(n_trials=99), limits=limits, footprint=exact, metering=False
        )

    study = optuna.create_study(sampler=make(base(seed=1)))  # type: ignore[call-arg]
    study.optimize(objective, n_trials=8)
    if where == "inside":
        study.sampler = make(PartialFixedSampler({"x": 9}, base(seed=2)))  # type: ignore[call-arg]
    else:
        study.sampler = PartialFixedSampler({"x": 9}, study.sampler)
    study.optimize(objective, n_trials=8)
    ran = [t for t in study.trials[8:] if t.user_attrs["quota:outcome"] == "completed"]
    assert len(ran) > 3
    assert all(t.params["x"] == 9 for t in ran)
    assert all(work_of(t.params) <= 110 for t in ran)


@pytest.mark.slow
def test_a_partially_fixed_grid_is_not_left() -> None:
    base = PartialFixedSampler({"y": 10}, GridSampler(GRID, seed=1))
    study = run_study(base, 60, footprint=exact)
    outcomes = {(t.params.get("x"), t.user_attrs["quota:outcome"]) for t in study.trials}
    assert outcomes >= {(1, "completed"), (10, "completed"), (100, "completed")}
    assert {x for x, _ in outcomes} <= set(GRID["x"])
    assert actions(study).keys() == {"rejected"}


def test_a_refused_enqueued_point_does_not_break_a_brute_force_search() -> None:
    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_int("x", 1, 3), trial.suggest_int("y", 1, 2)
        return float(x + y)

    limits = Limits(custom={"work": 104.0})
    study = optuna.create_study(
        sampler=QuotaSampler(
            BruteForceSampler(), quota=Quota(n_trials=99), limits=limits, footprint=exact
        )
    )
    # In another order than the objective asks for them, and in part only.
    for params in ({"x": 1, "y": 1}, {"y": 2, "x": 3}, {"x": 3}):
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=20)
    assert study.trials[1].user_attrs["quota:outcome"] == "rejected"
    visited = {(t.params["x"], t.params["y"]) for t in study.trials}
    assert visited == {(x, y) for x in (1, 2, 3) for y in (1, 2)}


def test_a_row_without_parameters_does_not_end_a_brute_force_search() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            raise RuntimeError("before its first parameter")
        return trial.suggest_int("x", 1, 4) + trial.suggest_int("y", 1, 2)

    study = optuna.create_study(sampler=QuotaSampler(BruteForceSampler(), quota=Quota(n_trials=4)))
    for n_trials in (4, 4, 99):  # The second refuses a trial.
        study.sampler = QuotaSampler(BruteForceSampler(), quota=Quota(n_trials=n_trials))
        study.optimize(objective, n_trials=20, catch=(RuntimeError,))
    done = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(done) == 8
    assert len({(t.params["x"], t.params["y"]) for t in done}) == 8
    assert any(not t.params and t.state == TrialState.PRUNED for t in study.trials)


def test_a_trial_that_ends_itself_before_its_first_parameter_ends_no_brute_force_search() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            study.tell(trial.number, state=TrialState.FAIL)
        return trial.suggest_int("x", 1, 3)

    sampler = QuotaSampler(BruteForceSampler(seed=0), quota=Quota(n_trials=9))
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=9)
    done = [t.params["x"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(done) == [1, 2, 3]


def test_a_rejected_row_has_its_enqueued_parameters() -> None:
    enqueued = [{"y": 1, "kind": "a"}] * 3 + [{"y": 99}] * 20
    study = run_study(TPESampler(seed=1), 23, enqueued=enqueued, on_veto="skip", footprint=exact)
    rejected = [t for t in study.trials if t.user_attrs["quota:outcome"] == "rejected"]
    assert rejected
    for trial in rejected:
        assert trial.params["y"] == 99
        assert trial.user_attrs["quota:proposed"]["params"]["y"] == 99


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TPESampler, "nearest"),
        (NSGAIISampler, "nearest"),
        (NSGAIIISampler, "nearest"),
        (GPSampler, "nearest"),
        (RandomSampler, "redraw"),
        (CmaEsSampler, "redraw"),
    ],
)
def test_the_replacement_suits_the_sampler_unless_chosen(
    kind: type[BaseSampler], expected: OnVeto
) -> None:
    # Built without its dependencies, which are optional.
    sampler = kind.__new__(kind)
    assert replacement_for(sampler, "auto") == expected
    choices: tuple[OnVeto, ...] = ("redraw", "nearest", "skip")
    assert [replacement_for(sampler, choice) for choice in choices] == list(choices)


@pytest.mark.parametrize("sampler", [GridSampler({"x": [1, 2]}), BruteForceSampler()])
@pytest.mark.parametrize("on_veto", ["auto", "redraw", "nearest", "skip"])
def test_an_enumerating_sampler_always_skips(sampler: BaseSampler, on_veto: OnVeto) -> None:
    assert replacement_for(sampler, on_veto) == "skip"


def test_a_range_that_depends_on_another_parameter_stays_as_likely() -> None:
    """Drawn at once it would come from the range of the trial before."""
    sampler = QuotaSampler(RandomSampler(seed=0), limits=Limits(cpu_time=1e6), metering="reported")
    bare = optuna.create_study(sampler=RandomSampler(seed=0))
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("quota:cpu_time", 1.0)
        return trial.suggest_int("k", 1, trial.suggest_int("n", 1, 10))

    for each in (study, bare):
        each.optimize(objective, n_trials=30)
    assert [trial.params for trial in study.trials] == [trial.params for trial in bare.trials]
