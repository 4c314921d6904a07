"""Plots of studies of all kinds, and the data behind them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
import json
import re
from typing import Any
from xml.etree import ElementTree

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
import pytest

from optuna_quota import analyze, Limits, Quota, QuotaSampler, status, Usage, visualization
from optuna_quota._analysis.study_trials import StudyTrials
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import Observation
from optuna_quota._records import Interval, read_record, TrialRecord
from optuna_quota._resources import OUTCOMES
from optuna_quota._usage import Breach
from optuna_quota.visualization import _theme
from optuna_quota.visualization._cost import quota_curves, waste_of
from optuna_quota.visualization._figures import thin
from optuna_quota.visualization._footprint import breach_probability
from optuna_quota.visualization._usage import timeline_of, timeline_svg
from tests.visualization_tests.studies import add_row, BEGIN, empty_study, made_study


GIB = 2**30
PLOTS: list[Callable[[optuna.Study], Any]] = [
    visualization.plot_usage,
    visualization.plot_usage_slice,
    visualization.plot_burn_down,
    visualization.plot_footprint,
    visualization.plot_quality_cost,
    visualization.plot_waste,
    visualization.plot_reliability,
]


def fitted(study: optuna.Study) -> Footprint:
    rows = []
    for trial in study.trials:
        record = read_record(trial)
        if record.outcome != "rejected":
            over = frozenset({"memory"} if record.outcome == "terminated" else ())
            rows.append(Observation(trial.params, trial.distributions, record.usage, over))
    return Footprint.fit(rows)


@cache
def study_of_size(n_trials: int) -> optuna.Study:
    """Return a study to be read only."""
    return made_study(n_trials) if n_trials else empty_study()


def svg_of(study: optuna.Study, index: int) -> str:
    trials = StudyTrials(study)
    return timeline_svg(timeline_of(trials.finished[index], trials.limits))


def axis_titles(figure: Any) -> set[str]:
    layout = figure.to_plotly_json()["layout"]
    return {v["title"]["text"] for k, v in layout.items() if "axis" in k and "title" in v}


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("n_trials", [0, 1, 20, 300])
def test_studies_of_any_size(plot: Callable[..., Any], n_trials: int) -> None:
    figure = plot(study_of_size(n_trials))
    json.loads(figure.to_json())
    assert figure.layout.title.text
    if not n_trials:
        assert not figure.data and figure.layout.annotations[0].text


@pytest.mark.parametrize(
    ("plot", "n_trials"),
    # Of 20 trials too few have a verdict.
    [(p, n) for p in PLOTS for n in (20, 300) if (p, n) != (visualization.plot_reliability, 20)],
)
def test_subtitles_fit_half_of_a_page(plot: Callable[..., Any], n_trials: int) -> None:
    _, line = plot(study_of_size(n_trials)).layout.title.text.split("<br>")
    assert len(re.sub("<[^>]*>", "", line)) <= 84


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_a_study_run_without_this_library_has_times(
    plot: Callable[..., Any],
) -> None:
    study = optuna.create_study()
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=8)
    resource = {} if plot in (PLOTS[2], *PLOTS[4:]) else {"resource": "wall_time"}
    assert plot(study, **resource).layout.title.text


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_a_study_whose_trials_all_failed(plot: Callable[..., Any]) -> None:
    study = empty_study()
    for _ in range(4):
        add_row(study, TrialRecord(outcome="failed", reason="ValueError"))
    assert plot(study).layout.title.text


def test_usage_has_a_colour_and_a_symbol_for_each_outcome() -> None:
    figure = visualization.plot_usage(made_study(80))
    names = {trace.name.split()[0] for trace in figure.data}
    assert names == {"completed", "pruned", "terminated", "rejected", "failed"}
    assert len({trace.marker.symbol for trace in figure.data}) == 5
    assert len({trace.marker.color for trace in figure.data}) == 5
    assert any(a.text == "limit 1 GiB" for a in figure.layout.annotations)


def test_usage_of_a_rejected_trial_is_its_projection() -> None:
    study = empty_study(limits=Limits(memory="1GiB"))
    projected = {"memory": Interval(2 * GIB, 3 * GIB, 5 * GIB)}
    add_row(study, TrialRecord(outcome="rejected", reason="too big", footprint=projected))
    figure = visualization.plot_usage(study)
    (trace,) = figure.data
    below, above = trace.error_y.arrayminus[0], trace.error_y.array[0]
    bounds = (trace.y[0] - below, trace.y[0], trace.y[0] + above)
    assert bounds == pytest.approx((2, 3, 5), rel=1e-4)
    assert "Memory (GiB)" in axis_titles(figure) and "projected 3 GiB" in trace.text[0]


@pytest.mark.parametrize(
    ("memory", "unit"), [(20 * 2**20, "MiB"), (2 * GIB, "GiB"), (2 * 2**40, "TiB")]
)
def test_axes_have_readable_units(memory: float, unit: str) -> None:
    study = empty_study()
    add_row(study, TrialRecord(Usage(memory=memory, wall_time=7200), "completed"))
    assert f"Memory ({unit})" in axis_titles(visualization.plot_usage(study))
    times = axis_titles(visualization.plot_usage(study, resource="wall_time"))
    assert "Wall time (h)" in times


def test_a_limit_far_above_does_not_flatten_the_trials() -> None:
    study = empty_study(limits=Limits(memory="64GiB"))
    for _ in range(3):
        add_row(study, TrialRecord(Usage(memory=300 * 2**20), "completed"))
    figure = visualization.plot_usage(study)
    assert figure.layout.yaxis.range[1] < 500
    assert figure.layout.annotations[0].text == "limit 64 GiB ↑"


@pytest.mark.parametrize("limit", ["1GiB", "64GiB"])
def test_the_label_of_the_limit_stands_beside_the_trials(limit: str) -> None:
    study = empty_study(limits=Limits(memory=limit))
    for _ in range(3):
        add_row(study, TrialRecord(Usage(memory=GIB), "completed"))
    layout = visualization.plot_usage(study).layout
    (label,) = layout.annotations
    assert label.xref == "x domain" and label.x > 1 and label.xanchor == "left"
    assert layout.margin.r > 6 * len(label.text)


def test_a_report_is_plotted_as_of_its_analysis() -> None:
    study = made_study(12)
    report = analyze(study)
    add_row(study, TrialRecord(Usage(memory=9e9, wall_time=1), "completed"))
    of_report, of_study = (visualization.plot_usage(source) for source in (report, study))
    counts = [sum(len(trace.x) for trace in figure.data) for figure in (of_report, of_study)]
    assert counts[1] == counts[0] + 1


def test_burn_down_counts_parallel_clock_time_once() -> None:
    study = empty_study(quota=Quota(wall_time=100, cpu_time=100, n_trials=10))
    # Two at once for 10 s, a pause, then one inside another.
    for start, seconds in [(0, 10), (0, 10), (50, 20), (55, 5)]:
        usage = Usage(wall_time=seconds, cpu_time=2)
        record = TrialRecord(usage, "completed")
        add_row(study, record, start=BEGIN + timedelta(seconds=start))
    curves = {c.resource: c for c in quota_curves(StudyTrials(study))}
    # By end: 10, 10, 60 (the inner one: 55 to 60), 70.
    assert curves["wall_time"].used == pytest.approx([0, 10, 10, 15, 30])
    assert curves["cpu_time"].used == pytest.approx([0, 2, 4, 6, 8])
    assert curves["n_trials"].left == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_burn_down_charges_what_the_ledger_does() -> None:
    study = empty_study(quota=Quota(cpu_time=100, n_trials=10))
    # Its worker died: what it used is unknown, so it is charged what it was granted.
    granted = {"trial": 0, "granted": {"cpu_time": 30}, "began": BEGIN.timestamp()}
    record = TrialRecord(outcome="failed", reason="The worker is gone.")
    add_row(study, record, seconds=5, reservation=granted)
    # It runs again, as another trial.
    again = {"trial": 1, "granted": {"cpu_time": 30}, "began": BEGIN.timestamp()}
    preempted = TrialRecord(Usage(cpu_time=7), "preempted", "The worker had to end.")
    add_row(study, preempted, seconds=5, reservation=again)
    # Its objective worked before it drew the parameter that was refused.
    late = {"trial": 2, "charged": {"cpu_time": 3}, "began": BEGIN.timestamp()}
    rejected = TrialRecord(outcome="rejected", reason="It would not fit.")
    add_row(study, rejected, seconds=5, reservation=late)
    curves = quota_curves(StudyTrials(study))
    used = {c.resource: c.used[-1] for c in curves}
    assert used == {"cpu_time": 40, "n_trials": 1}
    assert {len(curve.used) for curve in curves} == {3}
    assert used == status(study).table["used"][list(used)].to_dict()


def test_burn_down_of_a_copied_study_is_that_of_its_ledger() -> None:
    study = optuna.create_study(
        study_name="first", sampler=QuotaSampler(quota=Quota(n_trials=9, wall_time="1h"))
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    # Its rows have the same identifiers as those of the first one.
    storage = optuna.storages.InMemoryStorage()
    optuna.copy_study(
        from_study_name="first",
        from_storage=study._storage,
        to_storage=storage,
        to_study_name="second",
    )
    copy = optuna.load_study(study_name="second", storage=storage)
    used = status(copy).table["used"]
    for curve in quota_curves(StudyTrials(copy)):
        assert curve.used[-1] == pytest.approx(used[curve.resource])


def test_burn_down_projections_have_a_band() -> None:
    curves = quota_curves(StudyTrials(made_study(40)))
    ahead = next(c for c in curves if c.resource == "cpu_time").ahead
    assert ahead[0].trials == 0 and ahead[0].lower == ahead[0].upper
    middle = ahead[len(ahead) // 3]
    assert middle.lower < middle.median < middle.upper
    assert ahead[-1].median < ahead[0].median


def test_burn_down_needs_a_few_trials_to_project() -> None:
    curves = quota_curves(StudyTrials(made_study(3)))
    assert curves and all(not curve.ahead for curve in curves)


def test_footprint_counts_bounds_that_held_over_trials_with_known_usage() -> None:
    study = empty_study()
    for used, upper, outcome in [(1, 2, "completed"), (3, 2, "completed"), (9, 2, "terminated")]:
        record = TrialRecord(
            Usage(memory=used), outcome, footprint={"memory": Interval(0.5, 1, upper)}
        )
        add_row(study, record)
    title = visualization.plot_footprint(study).layout.title.text
    assert "1 of 2 trials within the upper bound" in title


def test_the_slice_shows_the_model_and_its_band() -> None:
    study = made_study(40)
    footprint = fitted(study)
    figure = visualization.plot_usage_slice(
        study, params=["width", "optimizer"], footprint=footprint
    )
    width, optimizer = [trace for trace in figure.data if trace.name == "model"]
    assert width.y[-1] > 2 * width.y[0]
    assert list(optimizer.x) == ["sgd", "adam", "lbfgs"]
    assert {"model", "model, 90%"} <= {trace.name for trace in figure.data}
    assert figure.layout.xaxis.type == "log" and figure.layout.xaxis2.type == "category"


def test_the_slice_refuses_an_unknown_parameter() -> None:
    with pytest.raises(ValueError, match=r"`params`.*'depth'.*layers"):
        visualization.plot_usage_slice(made_study(5), params=["depth"])


def test_the_slice_wraps_many_parameters_into_rows() -> None:
    study = empty_study()
    space = {f"p{i}": FloatDistribution(0, 1) for i in range(9)}
    for n in range(6):
        params = dict.fromkeys(space, n / 6)
        add_row(study, TrialRecord(Usage(memory=GIB)), params=params, space=space)
    layout = visualization.plot_usage_slice(study).layout
    assert (layout.height, layout.grid.rows, layout.grid.columns) == (1000, 3, 4)
    shown = [layout[f"yaxis{n}"].showticklabels for n in ("", 2, 5, 9)]
    assert shown == [True, False, True, True]


def test_the_front_has_no_trial_that_a_cheaper_one_equals() -> None:
    study = empty_study(directions=("maximize",))
    for seconds, value in [(1, 0.5), (2, 0.5), (3, 0.9), (4, 0.8), (3, 0.9), (5, 0.95)]:
        add_row(study, TrialRecord(Usage(wall_time=seconds), "completed"), values=(value,))
    figure = visualization.plot_quality_cost(study)
    (front,) = [trace for trace in figure.data if trace.name == "on the front (3)"]
    numbers = [int(text.split()[1].rstrip(",")) for text in front.text]
    assert list(zip(numbers, front.y, strict=True)) == [(0, 0.5), (2, 0.9), (5, 0.95)]


def test_several_objectives_need_a_target() -> None:
    study = made_study(10, directions=("minimize", "maximize"))
    with pytest.raises(ValueError, match="`target`"):
        visualization.plot_quality_cost(study)
    figure = visualization.plot_quality_cost(
        study, target=lambda t: t.values[1], target_name="accuracy", maximize=True
    )
    assert "accuracy (more is better)" in axis_titles(figure)


def test_values_that_are_not_finite_are_left_out() -> None:
    study = empty_study()
    for value in (float("inf"), float("-inf"), 0.3):
        add_row(study, TrialRecord(Usage(wall_time=1), "completed"), values=(value,))
    markers = [t for t in visualization.plot_quality_cost(study).data if t.mode == "markers"]
    assert [value for trace in markers for value in trace.y] == [0.3]


def test_the_timeline_ends_at_the_breach() -> None:
    study = empty_study(limits=Limits(memory="4GiB"))
    breach = Breach("memory", GIB, 1.1 * GIB, 3.5)
    record = TrialRecord(
        Usage(memory=1.1 * GIB),
        "terminated",
        breach.reason,
        breach,
        timeline=((0.0, 0.2 * GIB), (1.0, 0.5 * GIB)),
    )
    add_row(study, record)
    assert timeline_of(StudyTrials(study).finished[0], {"memory": 4 * GIB}).limit == GIB
    line, mark = visualization.plot_timeline(study, 0).data
    assert (line.x[-1], mark.x[0]) == (3.5, 3.5)
    with pytest.raises(ValueError, match="`number`"):
        visualization.plot_timeline(study, 9)


def test_the_timeline_is_of_what_was_breached() -> None:
    study = empty_study(limits=Limits(memory="1GiB", cpu_time=2, wall_time=5))
    memory, cpu_time = ((0.5, 1e8), (4.0, 2e8)), ((0.5, 0.2), (4.0, 1.9))
    for breach in (Breach("cpu_time", 2.0, 2.1, 4.2), Breach("wall_time", 5.0, 5.1, 5.1)):
        line = cpu_time if breach.resource == "cpu_time" else ()
        add_row(
            study,
            TrialRecord(
                outcome="terminated", breach=breach, timeline=memory, breach_timeline=line
            ),
        )
    cpu, wall = (visualization.plot_timeline(study, number) for number in (0, 1))
    assert "CPU time (s)" in axis_titles(cpu) and cpu.data[0].y[-1] == 2.1
    assert cpu.layout.annotations[0].text == "limit 2 s"
    assert "Memory (MiB)" in axis_titles(wall) and wall.layout.shapes[-1].x0 == 5.0
    svg = svg_of(study, 0)
    assert "CPU time of trial 0 over time" in svg and "limit 2 s" in svg


def test_published_subtitles_clear_the_toolbar() -> None:
    figure = visualization.plot_burn_down(study_of_size(20))
    thinned = thin(figure, 60)
    _, *lines = re.sub("<span[^>]*>|</span>", "", thinned.layout.title.text).split("<br>")
    assert len(lines) >= 2 and max(map(len, lines)) <= 42
    assert thinned.layout.margin.t > figure.layout.margin.t


def test_a_breached_peak_is_at_least_what_was_observed() -> None:
    study = empty_study(limits=Limits(memory="1GiB"))
    breach = Breach("memory", GIB, 1.2 * GIB, 3.5)
    add_row(study, TrialRecord(Usage(memory=0.8 * GIB), "terminated", breach.reason, breach))
    assert StudyTrials(study).finished[0].amounts["memory"] == 1.2 * GIB


def test_the_timeline_leaves_out_readings_after_the_end() -> None:
    study = empty_study()
    line = ((0.5, 1e8), (1.0, 2e8), (1.1, 0.0))
    add_row(study, TrialRecord(Usage(memory=2e8), "completed", timeline=line))
    assert timeline_of(StudyTrials(study).finished[0], {}).points == [(0.5, 1e8), (1.0, 2e8)]
    assert visualization.plot_timeline(study, 0).layout.xaxis.range[0] == 0


@pytest.mark.parametrize("reason", [None, "</text><script>&\u2028\x07"])
def test_the_svg_timeline_is_well_formed(reason: str | None) -> None:
    study = empty_study(limits=Limits(memory="1GiB", wall_time=1))
    for breach in (Breach("memory", GIB, 2 * GIB, 1.5), Breach("wall_time", 1.0, 1.1, 1.1)):
        for name in ("1GiB", "64GiB"):
            study.set_user_attr("quota:limits", {"memory": Limits(memory=name).memory})
            line = ((0.0, 1e8), (1.0, 2e8))
            record = TrialRecord(
                Usage(memory=2e8), "terminated", reason or breach.reason, breach, timeline=line
            )
            add_row(study, record)
            svg = svg_of(study, -1)
            root = ElementTree.fromstring(svg)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert not root.findall(".//{*}script") and "nan" not in svg
            texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
            limit = "1 GiB" if breach.resource == "memory" or name == "1GiB" else "64 GiB"
            assert any(f"limit {limit}" in text for text in texts)


def test_thinned_figures_keep_rare_outcomes() -> None:
    figure = visualization.plot_usage(study_of_size(300))
    thinned = thin(figure, 60)
    assert [trace.name for trace in thinned.data] == [trace.name for trace in figure.data]
    assert sum(len(trace.x) for trace in thinned.data) <= 90
    assert all(trace.text is None for trace in thinned.data)
    assert "markers shown" in thinned.layout.title.text
    assert len(figure.data[0].x) > 100, "the figure itself stays whole"


def test_every_outcome_has_a_style() -> None:
    assert set(OUTCOMES) <= set(_theme.OUTCOMES)


def test_waste_adds_up_to_all_that_was_spent() -> None:
    study = made_study(60)
    waste = waste_of(StudyTrials(study))
    for resource in waste.spent:
        shares = [waste.share(resource, outcome) for outcome in waste.trials]
        assert sum(shares) == pytest.approx(1)
    assert waste.share("wall_time", "terminated") > 0.1
    assert sum(waste.trials.values()) == 60


def test_names_are_escaped() -> None:
    name = "<a href='https://example.org'>x</a>"
    choice = "<b>bold</b>"
    space = {name: FloatDistribution(0, 1), "c": CategoricalDistribution([choice, "y"])}
    study = empty_study()
    for n in range(4):
        params = {name: n / 4, "c": choice if n % 2 else "y"}
        record = TrialRecord(Usage(memory=GIB + n), "failed", f"<img src=x> {choice}")
        add_row(study, record, params=params, space=space)
    text = visualization.plot_usage_slice(study).to_json()
    assert "<a href" not in text and "<b>bold" not in text and "<img" not in text


def test_reliability_compares_projected_with_seen_breaches() -> None:
    study = empty_study(limits=Limits(memory="1GiB"))
    # Half of the probability is above the limit.
    projected = {"memory": Interval(GIB // 2, GIB, 2 * GIB)}
    for number in range(20):
        if number % 4:
            add_row(study, TrialRecord(Usage(memory=GIB // 2), "completed", footprint=projected))
        else:
            breach = Breach("memory", GIB, GIB + 1, 1.0)
            add_row(study, TrialRecord(outcome="terminated", breach=breach, footprint=projected))
    add_row(study, TrialRecord(outcome="failed", footprint=projected))
    # Another limit, for which nothing was projected, says nothing about this one.
    breach = Breach("wall_time", 1.0, 1.0, 1.0)
    add_row(study, TrialRecord(outcome="terminated", breach=breach, footprint=projected))
    figure = visualization.plot_reliability(study)
    _, points = figure.data
    # The record has five digits.
    assert points.x[0] == pytest.approx(50, abs=0.01) and list(points.y) == [25]
    assert points.y[0] - points.error_y.arrayminus[0] == pytest.approx(12.74, abs=0.01)
    text = "5 of 20 trials breached, 10.0 projected: fewer than by chance"
    assert text in figure.layout.title.text


def test_reliability_tells_replaced_points_and_audits_apart() -> None:
    rows = empty_study(limits=Limits(memory="1GiB"))
    for size in (GIB // 2, 4 * GIB):
        projected = {"memory": Interval(size / 2, size, 2 * size)}
        for number in range(20):
            record = TrialRecord(Usage(memory=GIB // 2), "completed", footprint=projected)
            if number % 2 == (size > GIB):
                breach = Breach("memory", GIB, GIB + 1, 1.0)
                record = TrialRecord(outcome="terminated", breach=breach, footprint=projected)
            add_row(rows, record)
    study = empty_study(limits=Limits(memory="1GiB"))
    for row in rows.trials:
        action = (None, "redrawn", "moved", "audited")[row.number % 4]
        if action is not None:
            row.user_attrs["quota:proposed"] = {"action": action}
        study.add_trial(row)
    _, *groups = visualization.plot_reliability(study).data
    assert [trace.name for trace in groups] == [
        "as drawn (10)",
        "in place of a refused point (20)",
        "refused, run as an audit (10)",
    ]
    drawn, replaced, audited = groups
    # A point in each bin: one for the small points, one for the large.
    assert [len(trace.x) for trace in groups] == [2, 2, 2]
    assert list(drawn.y) == [100, 0] and list(audited.y) == [0, 100]
    assert list(replaced.y) == [50, 50]


def test_a_certain_breach_has_a_bin() -> None:
    study = empty_study(limits=Limits(memory="1GiB"))
    projected = {"memory": Interval(2 * GIB, 2 * GIB, 2 * GIB)}
    breach = Breach("memory", GIB, GIB + 1, 1.0)
    for _ in range(20):
        add_row(study, TrialRecord(outcome="terminated", breach=breach, footprint=projected))
    _, points = visualization.plot_reliability(study).data
    assert list(points.x) == [100] and list(points.y) == [100]


@pytest.mark.parametrize(
    ("interval", "limit", "probability"),
    [
        (Interval(1.0, 2.0, 4.0), 4.0, 0.05),
        (Interval(11.0, 12.0, 14.0), 14.0, 0.05),  # the same above a floor of 10
        (Interval(11.0, 12.0, 14.0), 9.0, 1.0),
        (Interval(3.0, 3.0, 3.0), 2.0, 1.0),
        (Interval(0.0, 0.0, 0.0), 2.0, 0.0),
    ],
)
def test_the_quantiles_of_a_footprint_give_the_probability_of_a_breach(
    interval: Interval, limit: float, probability: float
) -> None:
    assert breach_probability(interval, limit) == pytest.approx(probability)
