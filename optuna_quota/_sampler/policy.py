"""What replaces a refused point, by sampler.

Measured, see ``benchmarks/point_admission.py``. TPE and NSGA-II have found more by a quarter of
the budget where the nearest admitted point is taken than where they draw again (NSGA-II beyond the
noise of the seeds, TPE not quite), and waste as much or hardly more. So does a random search, but
it then wastes more and is random no longer: it draws again, as do samplers that were not compared.
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
