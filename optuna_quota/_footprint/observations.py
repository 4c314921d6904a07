"""The trials that footprint models are fitted to: read, select some of many, keep as JSON.

A footprint's versioned JSON has its trials, and loading fits the models again. Files are not
trusted: nothing is executed, all numbers must be finite and in their range, sizes are bounded, and
an invalid file is a ``ValueError``. Fitting takes 0.22 to 0.36 s of CPU for the most points of a
footprint (100) and three resources, and 8 s per resource for the most columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import json
import math
import sys
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from optuna_quota._footprint.features import (
    CategoryFeature,
    Feature,
    Features,
    is_scalar,
    NumericFeature,
)
from optuna_quota._records import evidence, Interval, outcome_of, read_record, TrialRecord
from optuna_quota._table import usage_at_least
from optuna_quota._usage import Usage, usage_from_amounts


# The cost of a fit is cubic in the points; beyond this number, more points help little.
MAX_OBSERVATIONS = 100
_RECENT = 40


@dataclass(frozen=True)
class Observation:
    """One trial: its point and its measured usage.

    Args:
        params: Value of each hyperparameter.
        distributions: Distribution of each.
        usage: What was measured.
        censored: Resources whose usage is a lower bound, because their limit stopped the trial.
        partial: Resources whose usage is that at an unknown share of the trial's run, because
            something else stopped it.
        maybe_censored: Resources whose usage may be one: peaks of a stopped trial. Each step of a
            training mostly repeats the one before, but later steps may take more data or a larger
            model. The model's fit decides.
        projected: The footprint that was projected before it ran.
        is_complete: Whether the trial completed, so that no parameter is missing.
        is_ratio: Whether the usage is a multiple of a stated one, which larger sizes don't raise.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    usage: Usage
    censored: frozenset[str] = frozenset()
    maybe_censored: frozenset[str] = frozenset()
    partial: frozenset[str] = frozenset()
    projected: Mapping[str, Interval] = field(default_factory=dict)
    is_complete: bool = True
    is_ratio: bool = False

    @property
    def is_surprise(self) -> bool:
        """Whether the usage of any resource was outside its projected interval."""
        known = ((name, self.usage.get(name), each) for name, each in self.projected.items())
        return any(
            amount is not None
            and (
                amount > each.upper
                or (amount < each.lower and name not in self.censored | self.partial)
            )
            for name, amount, each in known
        )


def read_observation(trial: FrozenTrial) -> Observation | None:
    """Return a finished trial as an observation, None if its usage is unknown."""
    return observation_of(trial, read_record(trial)) if trial.state.is_finished() else None


def observation_of(trial: FrozenTrial, record: TrialRecord) -> Observation | None:
    """Return a finished trial given with its record, None if its usage is unknown."""
    end = outcome_of(trial, record), record.censored_by
    amounts = usage_at_least(trial, record)
    says = {name: evidence(name, *end) for name in amounts}
    if end[0] == "failed" and record.usage.wall_time is None:
        # If its worker died, Optuna's end time is when that was noticed.
        amounts.pop("wall_time", None)
    if record.outcome == "rejected" or not amounts:
        return None
    return Observation(
        params=trial.params,
        distributions=trial.distributions,
        usage=usage_from_amounts(amounts),
        censored=frozenset(name for name in amounts if says[name] == "lower bound"),
        partial=frozenset(name for name in amounts if says[name] == "partial"),
        maybe_censored=frozenset(name for name in amounts if says[name] == "partial peak"),
        projected=record.footprint,
        is_complete=trial.state.name == "COMPLETE",
    )


def select_observations(
    observations: Sequence[Observation], most: int = MAX_OBSERVATIONS
) -> list[Observation]:
    """Return at most ``most`` observations, oldest first.

    The newest show where the sampler is now; the others are spread evenly over the amounts of each
    resource, so that the smallest and the largest, also of stopped trials, are kept.
    """
    if len(observations) <= most:
        return list(observations)
    n_newest = min(_RECENT, most // 2)
    n_older = len(observations) - n_newest
    older = observations[:n_older]
    kept = set(range(n_older, len(observations)))
    names = sorted({name for each in older for name in each.usage.amounts()})
    for n_done, name in enumerate(names):
        amounts = np.array([each.usage.get(name) for each in older], dtype=float)
        order = np.argsort(amounts, kind="stable")[: int(np.sum(np.isfinite(amounts)))]
        # Resources mostly rank the trials alike: those that another one chose are not counted.
        order = np.array([i for i in order if i not in kept], dtype=int)
        if len(order):
            count = min((most - len(kept)) // (len(names) - n_done), len(order))
            ranks = np.linspace(0, len(order) - 1, count)
            kept.update(order[ranks.round().astype(int)].tolist())
    return [observations[i] for i in sorted(kept)]


FORMAT = "optuna_quota.footprint"
VERSION = 3
# Files of version 2 hold the same points, and fitted models beside them that are not read.
_READABLE = (2, 3)

_MAX_POINTS = 2_000
_MAX_COLUMNS = 2_000
_MAX_RESOURCES = 50
_MAX_CHARACTERS = 20_000_000
_MAX_NUMBER = sys.float_info.max
_LOWEST = {"log": math.ulp(0.0), "rate": math.ulp(0.0), "log1p": 0.0, "linear": -_MAX_NUMBER}


def dump_json(features: Features, observations: Sequence[Observation], confidence: float) -> str:
    """Return the parts of a footprint as JSON text; ``ValueError`` if it has too many columns."""
    _check_width(features)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "confidence": confidence,
        "features": [_feature_object(part) for part in features.parts],
        "points": [
            {
                "params": {name: _plain(value) for name, value in each.params.items()},
                "usage": each.usage.amounts(),
                "censored": sorted(each.censored),
                "maybe_censored": sorted(each.maybe_censored),
                "partial": sorted(each.partial),
            }
            for each in observations
        ],
    }
    return json.dumps(document, allow_nan=False)


def load_json(text: str) -> tuple[list[Observation], float]:
    """Return the observations and the confidence of a footprint from JSON text."""
    if not isinstance(text, str):
        raise ValueError(f"A footprint must be JSON text but got {type(text).__name__}.")
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(
            f"A footprint must have at most {_MAX_CHARACTERS} characters but got {len(text)}."
        )
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("A footprint must be JSON but is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"A footprint must be JSON but: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"A footprint must be a JSON object whose format is {FORMAT!r}.")
    version = document.get("version")
    if isinstance(version, bool) or version not in _READABLE:
        raise ValueError(
            f"A footprint must be of version 2 or 3 but is of version {version!r}: write it again "
            "with `analyze(study).footprint.to_json()`, or update optuna_quota if it is newer."
        )
    features = Features(tuple(_feature(each) for each in _items(document, "features")))
    if len({part.name for part in features.parts}) < len(features.parts):
        raise ValueError("`features` must have distinct names.")
    _check_width(features)
    points = _items(document, "points")
    if len(points) > _MAX_POINTS:
        raise ValueError(
            f"A footprint must have at most {_MAX_POINTS} points but has {len(points)}."
        )
    space = features.distributions()
    confidence = _number(document.get("confidence"), "confidence", 0.5, 1.0)
    observations = [_observation(each, space) for each in points]
    resources = {name for each in observations for name in each.usage.amounts()}
    if len(resources) > _MAX_RESOURCES:
        raise ValueError(
            f"A footprint must have at most {_MAX_RESOURCES} resources but has {len(resources)}."
        )
    return observations, confidence


def _check_width(features: Features) -> None:
    if features.width > _MAX_COLUMNS:
        raise ValueError(
            f"A footprint must have at most {_MAX_COLUMNS} columns, one for each number and each "
            f"choice, but has {features.width}."
        )


def _feature_object(part: Feature) -> dict[str, Any]:
    if isinstance(part, CategoryFeature):
        return {"name": part.name, "choices": [_plain(choice) for choice in part.choices]}
    return {"name": part.name, "low": part.low, "high": part.high, "scale": part.scale}


def _feature(value: Any) -> Feature:
    found = _mapping(value, "feature")
    name = found.get("name")
    if not isinstance(name, str):
        raise ValueError(f"The name of a feature must be text but got {_short(name)}.")
    if "choices" in found:
        choices = _items(found, "choices")
        if not 0 < len(choices) <= _MAX_COLUMNS:
            raise ValueError(
                f"{name!r} must have from 1 to {_MAX_COLUMNS} choices but has {len(choices)}."
            )
        return CategoryFeature(name, tuple(_scalar(choice, name) for choice in choices))
    low = _number(found.get("low"), f"{name}.low")
    high = _number(found.get("high"), f"{name}.high")
    scale = found.get("scale")
    if not isinstance(scale, str) or scale not in _LOWEST or not _LOWEST[scale] <= low <= high:
        raise ValueError(
            f"{name!r} must have a known scale and a range that suits it but is {_short(found)}."
        )
    return NumericFeature(name, low, high, scale)


def _observation(value: Any, space: Mapping[str, Any]) -> Observation:
    found = _mapping(value, "point")
    params = _mapping(found.get("params"), "params")
    if len(params) > _MAX_COLUMNS:
        raise ValueError(f"A point must have at most {_MAX_COLUMNS} params but has {len(params)}.")
    usage = _mapping(found.get("usage"), "usage")
    for name in usage:
        if not name.isidentifier():
            raise ValueError(f"A resource must be named by an identifier but got {name!r}.")
    amounts = {name: _number(amount, name, 0.0) for name, amount in usage.items()}
    return Observation(
        params={name: _scalar(each, name) for name, each in params.items()},
        distributions=space,
        usage=usage_from_amounts(amounts),
        censored=_resources(found, "censored"),
        maybe_censored=_resources({"maybe_censored": [], **found}, "maybe_censored"),
        partial=_resources({"partial": [], **found}, "partial"),
    )


def _plain(value: Any) -> Any:
    """Return a value that JSON can store: text unless it is a finite scalar."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if is_scalar(value) else repr(value)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be an object but got {_short(value)}.")
    return value


def _items(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list but got {_short(value)}.")
    return value


def _resources(found: Mapping[str, Any], name: str) -> frozenset[str]:
    names = _items(found, name)
    if not all(isinstance(each, str) for each in names):
        raise ValueError(f"`{name}` must be names of resources but got {_short(names)}.")
    return frozenset(names)


def _number(value: Any, name: str, low: float = -_MAX_NUMBER, high: float = _MAX_NUMBER) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number but got {_short(value)}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be from {low:g} to {high:g} but got {_short(value)}.")
    return float(value)


def _scalar(value: Any, name: str) -> Any:
    if not is_scalar(value):
        raise ValueError(
            f"`{name}` must be a finite number, text, a boolean or null but got {_short(value)}."
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
