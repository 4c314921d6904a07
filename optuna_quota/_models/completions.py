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


def _agrees(known: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    return all(
        value == known[name]
        for name, value in params.items()
        if name in known and isinstance(value, (str, bool))
    )
