"""What the ledger answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

from optuna_quota._ledger.protocol import DEVICE
from optuna_quota._ledger.protocol import is_held
from optuna_quota._ledger.protocol import Shortage
from optuna_quota._ledger.request import LEAST_SHARE
from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Quota


# Sums of floats differ in their last bits by their order.
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class Grant:
    """A trial was admitted.

    Attributes:
        left: What it may use for now, by resource, counted from its start; ``extend`` may raise
            it. ``wall_time`` is how long it may run until the study's clock time is used up.
        reason: One sentence for a person.
        gpu: The GPU with room that it was given, by UUID; None when there is no choice to make.
    """

    left: Mapping[str, float] = field(default_factory=dict)
    reason: str = "It fits."
    gpu: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A trial was not admitted.

    Attributes:
        resource: The resource that decided.
        reason: One sentence for a person.
        wanted: The least that would have done.
        used: What finished trials used of it.
        reserved: What running trials hold of it.
        quota: The quota.
        final: True when nothing more can be admitted to the study; False when this trial can't
            be, while a smaller one might.
        late: True when the study ended while the trial waited.
    """

    resource: str
    reason: str
    wanted: float
    used: float
    reserved: float
    quota: float
    final: bool
    late: bool = False


def refuse(shortage: Shortage, *, final: bool) -> Refusal:
    """Return the refusal of a trial for what is short."""
    return Refusal(
        shortage.resource,
        _sentence(shortage),
        shortage.wanted,
        shortage.used,
        shortage.reserved,
        shortage.quota,
        final,
    )


def hopeless(short: Shortage) -> Refusal | None:
    """Return a refusal when waiting for others can't help, None when it may."""
    if is_held(short.resource):
        over = short.wanted > short.quota * _SLACK
        return refuse(short, final=False) if over else None
    # Whoever was granted a trial will have run it; all else may be given back.
    spent = short.used + (short.granted if short.resource == "n_trials" else 0.0)
    over = spent + short.wanted > short.quota * _SLACK
    return refuse(short, final=True) if over else None


def too_late(short: Shortage) -> Refusal:
    """Return the refusal of a trial that waited until its study ended."""
    device = short.resource.startswith(DEVICE)
    title = get_resource("gpu_memory" if device else short.resource).title
    reason = f"The study ended while the trial waited for {title} that others hold."
    return replace(refuse(short, final=False), reason=reason, late=True)


def beyond(
    quota: Quota,
    used: Mapping[str, float],
    footprint: Mapping[str, float],
    granted: Mapping[str, float] | None = None,
) -> Refusal | None:
    """Return the refusal when too little of a total quota is left for any trial, else None.

    Args:
        quota: The study's quota.
        used: What was used, by resource.
        footprint: Upper bounds of what a trial uses, where known; only its clock time counts
            here, as trials that overlap share it and there is nothing to reserve.
        granted: What running trials were granted, by resource; without it, only what is used
            up for good counts.
    """
    for name, total in quota.totals.items():
        least = 1.0 if name == "n_trials" else LEAST_SHARE * total
        if name == "wall_time":
            least = footprint.get(name, least)
        held = (granted or {}).get(name, 0.0)
        spent = used.get(name, 0.0) + (held if name == "n_trials" else 0.0)
        if spent + least > total * _SLACK:
            return refuse(Shortage(name, least, used.get(name, 0.0), held, total), final=True)
    return None


def _sentence(short: Shortage) -> str:
    device = short.resource.startswith(DEVICE)

    def text(amount: float) -> str:
        return format_amount("gpu_memory" if device else short.resource, amount)

    if device:
        gpu = short.resource.removeprefix(DEVICE)
        return f"It would hold {text(short.wanted)} of {gpu}, which has {text(short.quota)}."
    title = get_resource(short.resource).title
    if is_held(short.resource):
        held = f"It would hold {text(short.wanted)} of {title}"
        return f"{held}, over the quota of {text(short.quota)}."
    if short.resource == "n_trials":
        running = f" and {text(short.reserved)} still run" if short.reserved > 0 else ""
        return (
            f"The quota of {text(short.quota)} trials is used up: {text(short.used)} have "
            f"run{running}."
        )
    reserved = f" and {text(short.reserved)} reserved" if short.reserved > 0 else ""
    spent = f"{text(short.used)} used{reserved}"
    if short.used + short.wanted > short.quota * _SLACK:
        return f"The quota of {text(short.quota)} of {title} is used up: {spent}."
    return (
        f"The quota of {text(short.quota)} of {title} has no room for another "
        f"{text(short.wanted)}: {spent}."
    )
