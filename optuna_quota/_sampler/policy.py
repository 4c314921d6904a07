"""What replaces a refused point, by sampler.

Measured, see ``benchmarks/point_admission.py``: samplers that draw at random give another point
when asked again; GPSampler gives the same one after a tenth of a second; GridSampler and
BruteForceSampler walk a list, and count a point as visited when its trial ends. A population of
NSGA-II spends its generations better on the nearest admitted points than on other draws; TPE finds
good points sooner with other draws, and a random search stays random only with them.
"""

from __future__ import annotations

from typing import get_args
from typing import Literal

from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler
from optuna.samplers import GPSampler
from optuna.samplers import GridSampler
from optuna.samplers import NSGAIIISampler
from optuna.samplers import NSGAIISampler


OnVeto = Literal["auto", "redraw", "nearest", "skip"]
ON_VETO: tuple[str, ...] = get_args(OnVeto)

_LISTS = (GridSampler, BruteForceSampler)
_NEAREST = (GPSampler, NSGAIISampler, NSGAIIISampler)


def replacement_for(sampler: BaseSampler, on_veto: OnVeto) -> OnVeto:
    """Return what replaces a refused point: ``"redraw"``, ``"nearest"`` or ``"skip"``.

    A sampler that is asked to redraw and repeats itself is found out in doing so.
    """
    if draws_from_a_list(sampler):
        return "skip"
    if on_veto != "auto":
        return on_veto
    return "nearest" if isinstance(sampler, _NEAREST) else "redraw"


def needs_whole_points(sampler: BaseSampler) -> bool:
    """Return whether a trial must not end before its point is whole.

    BruteForceSampler takes a point that breaks off for a leaf of its tree.
    """
    return isinstance(sampler, BruteForceSampler)


def draws_from_a_list(sampler: BaseSampler) -> bool:
    """Return whether a sampler walks a list of points."""
    return isinstance(sampler, _LISTS)
