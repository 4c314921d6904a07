"""The timeline of a trial's memory: few points, peaks kept."""

from __future__ import annotations

from hypothesis import given, strategies as st

from optuna_quota._metering.monitored_trial import UsageTimeline


SAMPLES = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e12)), min_size=1, max_size=300).map(
    lambda pairs: sorted(pairs)
)


@given(SAMPLES)
def test_the_timeline_is_bounded_ordered_and_keeps_the_peak(samples) -> None:  # type: ignore[no-untyped-def]
    timeline = UsageTimeline()
    for seconds, value in samples:
        timeline.add(seconds, value)
    points = timeline.points()
    assert 1 <= len(points) <= 60
    assert list(points) == sorted(points)
    assert set(points) <= set(samples)
    assert max(value for _, value in points) == max(value for _, value in samples)


def test_short_spikes_survive_a_long_flat_run() -> None:
    timeline = UsageTimeline()
    spikes = {777, 3333, 5000, 9001}
    for i in range(10_000):
        timeline.add(i * 0.1, 9.0 + i if i in spikes else 1.0)
    values = {value for _, value in timeline.points()}
    assert {9.0 + i for i in spikes} <= values
    assert 30 <= len(timeline.points()) <= 60


def test_nothing_sampled() -> None:
    assert UsageTimeline().points() == ()
