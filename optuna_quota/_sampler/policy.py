"""What replaces a refused point, by sampler.

Measured, see ``benchmarks/point_admission.py``. With the nearest admitted point TPE wastes less
than where it draws again, and NSGA-II finds more, both beyond the noise of the seeds; neither is
worse beyond it. A random search too wastes less and finds more with it, but is random no longer:
it draws again, and its points stay as likely as each other; so do samplers that were not compared.
GPSampler gives the same point after a tenth of a second when it is asked again. GridSampler and
BruteForceSampler walk a list, and count a point as visited when its trial ends.
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
from optuna.samplers import TPESampler


OnVeto = Literal["auto", "redraw", "nearest", "skip"]
ON_VETO: tuple[str, ...] = get_args(OnVeto)

_LISTS = (GridSampler, BruteForceSampler)
_NEAREST = (TPESampler, NSGAIISampler, NSGAIIISampler, GPSampler)


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
