"""What a half-drawn point may become: parameters not drawn yet, as earlier trials had them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any


_MOST = 16


def completions(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return points that a half-drawn one may become, itself when nothing is missing.

    A conditional parameter exists only beside certain choices, so that only earlier trials that
    made the same choices tell what is still to be drawn.

    Args:
        known: Parameters drawn so far.
        past: Points of earlier trials; the newest are asked first.
    """
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not _agrees(known, params):
            continue
        missing = {name: value for name, value in params.items() if name not in known}
        if not missing:
            # One that made the same choices had no more parameters than these.
            return [known] if not found else [*found, known]
        found.append({**missing, **known})
        if len(found) >= _MOST:
            break
    return found or [known]


def whole_points(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return whole points that a half-drawn one may become; none where that is unknown.

    Stricter than :func:`completions`: a point is whole when a trial that completed had the same
    parameters and made the same choices. A whole number counts as a choice where it always went
    with the same parameters, such as a number of layers that have a width each.

    Args:
        known: Parameters drawn so far.
        past: Points of trials that completed; the newest are asked first.
    """
    choices = _whole_number_choices(known, past)
    found: list[Mapping[str, Any]] = []
    for params in reversed(past):
        if not known.keys() <= params.keys() or not _agrees(known, params):
            continue
        if any(known[name] != params[name] for name in choices):
            continue
        if len(params) == len(known):
            return [*found, known]
        found.append({**params, **known})
        if len(found) >= _MOST:
            break
    return found


def _whole_number_choices(
    known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return the whole numbers that may decide which parameters there are.

    That one does not is known once it had two values beside the same parameters.
    """
    values: dict[tuple[str, frozenset[str]], set[Any]] = {}
    for params in past:
        names = frozenset(params)
        for name in known.keys() & names:
            values.setdefault((name, names), set()).add(params[name])
    free = {name for (name, _), seen in values.items() if len(seen) > 1}
    return [
        name
        for name, value in known.items()
        if isinstance(value, int) and not isinstance(value, bool) and name not in free
    ]


def _agrees(known: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    return all(
        value == known[name]
        for name, value in params.items()
        if name in known and isinstance(value, (str, bool))
    )
