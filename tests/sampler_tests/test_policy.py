"""What replaces a refused point, by sampler: as benchmarks/point_admission.py decided it."""

from __future__ import annotations

from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import GPSampler
from optuna.samplers import GridSampler
from optuna.samplers import NSGAIIISampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
import pytest

from optuna_quota._sampler.candidates import OnVeto
from optuna_quota._sampler.candidates import replacement_for


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
def test_a_sampler_gets_what_suits_it_unless_told_otherwise(
    kind: type[BaseSampler], expected: OnVeto
) -> None:
    # Built without its dependencies, which are optional.
    sampler = kind.__new__(kind)
    assert replacement_for(sampler, "auto") == expected
    choices: tuple[OnVeto, ...] = ("redraw", "nearest", "skip")
    assert [replacement_for(sampler, told) for told in choices] == list(choices)


@pytest.mark.parametrize("sampler", [GridSampler({"x": [1, 2]}), BruteForceSampler()])
@pytest.mark.parametrize("told", ["auto", "redraw", "nearest", "skip"])
def test_a_list_is_never_left(sampler: BaseSampler, told: OnVeto) -> None:
    assert replacement_for(sampler, told) == "skip"
