"""Footprints as JSON: versioned plain numbers and text, checked when read.

A file may come from anywhere. Nothing in it is executed, every number is checked to be finite and
in its range, sizes are bounded, and what does not fit together is a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import json
import math
from typing import Any

import numpy as np

from optuna_quota._footprint.censoring import Sites
from optuna_quota._footprint.features import CategoryFeature
from optuna_quota._footprint.features import Feature
from optuna_quota._footprint.features import Features
from optuna_quota._footprint.features import NumericFeature
from optuna_quota._footprint.fit import ChainedModel
from optuna_quota._footprint.fit import Model
from optuna_quota._footprint.gaussian_process import Hyperparameters
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._resources import Usage
from optuna_quota._resources import USAGE_RESOURCES


FORMAT = "optuna_quota.footprint"
VERSION = 2

_MOST_POINTS = 2_000
_MOST_COLUMNS = 2_000
_MOST_CHARACTERS = 20_000_000
_LARGEST = 1e300
_LARGEST_LOG = 50.0
_SCALES = ("log", "log1p", "linear")


@dataclass(frozen=True)
class Point:
    """One trial that a footprint was learned from.

    Attributes:
        params: Value of each hyperparameter.
        usage: What was measured.
        censored: Resources of which it would have used more.
    """

    params: Mapping[str, Any]
    usage: Usage
    censored: frozenset[str]


@dataclass(frozen=True)
class Contents:
    """What makes up a footprint."""

    features: Features
    points: tuple[Point, ...]
    models: Mapping[str, Model]
    confidence: float


def dump(contents: Contents) -> str:
    """Return a footprint's contents as JSON text."""
    chained = {n: m for n, m in contents.models.items() if isinstance(m, ChainedModel)}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "confidence": contents.confidence,
        "features": [_feature_object(part) for part in contents.features.parts],
        "points": [
            {
                "params": {name: plain(value) for name, value in point.params.items()},
                "usage": point.usage.amounts(),
                "censored": sorted(point.censored),
            }
            for point in contents.points
        ],
        "models": {
            name: _model_object(model)
            for name, model in contents.models.items()
            if isinstance(model, ResourceModel)
        },
        "ratios": {name: {"on": m.on, **_model_object(m.ratio)} for name, m in chained.items()},
    }
    return json.dumps(document, allow_nan=False)


def load(text: str) -> Contents:
    """Return a footprint's contents from JSON text.

    Raises:
        ValueError: If the text is no footprint, of a later version, or its parts do not fit.
    """
    if not isinstance(text, str):
        raise ValueError(f"A footprint must be JSON text but got {type(text).__name__}.")
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(
            f"A footprint must have at most {_MOST_CHARACTERS} characters but got {len(text)}."
        )
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("A footprint must be JSON but is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"A footprint must be JSON but: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"A footprint must be a JSON object whose format is {FORMAT!r}.")
    version = document.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(
            f"A footprint must be of version {VERSION} but is of version {version!r}."
        )
    return _contents(document)


def plain(value: Any) -> Any:
    """Return a value that JSON keeps: text for what is no scalar."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else repr(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _contents(document: Mapping[str, Any]) -> Contents:
    confidence = _number(document.get("confidence"), "confidence", 0.5, 1.0)
    if not 0.5 < confidence < 1:
        raise ValueError(f"`confidence` must be above 0.5 and below 1 but got {confidence!r}.")
    features = Features(tuple(_feature(each) for each in _items(document, "features")))
    names = [part.name for part in features.parts]
    if len(set(names)) < len(names) or features.width > _MOST_COLUMNS:
        raise ValueError("`features` must have distinct names and a bounded number of columns.")
    points = tuple(_point(each) for each in _items(document, "points"))
    if len(points) > _MOST_POINTS:
        raise ValueError(f"`points` must be at most {_MOST_POINTS} but got {len(points)}.")
    columns = features.encode([point.params for point in points])
    models: dict[str, Model] = {}
    for name, value in _mapping(document.get("models"), "models").items():
        models[_resource(name)] = _model(value, _known(points, name), columns)
    for name, value in _mapping(document.get("ratios"), "ratios").items():
        base = models.get(_text(_mapping(value, name).get("on"), "on"))
        if not isinstance(base, ResourceModel):
            raise ValueError(f"The ratio {name!r} must be on a resource that has a model.")
        ratio = _model(value, _known(points, name), columns)
        models[_resource(name)] = ChainedModel(str(value["on"]), base, ratio)
    return Contents(features, points, dict(sorted(models.items())), confidence)


def _feature_object(part: Feature) -> dict[str, Any]:
    if isinstance(part, CategoryFeature):
        return {"name": part.name, "choices": [plain(choice) for choice in part.choices]}
    return {"name": part.name, "low": part.low, "high": part.high, "scale": part.scale}


def _feature(value: Any) -> Feature:
    found = _mapping(value, "feature")
    name = _text(found.get("name"), "name")
    if "choices" in found:
        choices = _items(found, "choices")
        if not 0 < len(choices) <= _MOST_COLUMNS:
            raise ValueError(f"`choices` of {name!r} must be some but got {len(choices)}.")
        return CategoryFeature(name, tuple(_scalar(choice, name) for choice in choices))
    low = _number(found.get("low"), f"{name}.low")
    high = _number(found.get("high"), f"{name}.high")
    scale = found.get("scale")
    lowest = {"log": 1e-300, "log1p": 0.0}.get(str(scale), -_LARGEST)
    if scale not in _SCALES or low > high or low < lowest:
        raise ValueError(f"The range of {name!r} must suit its scale but got {found!r}.")
    return NumericFeature(name, low, high, scale)


def _point(value: Any) -> Point:
    found = _mapping(value, "point")
    params = _mapping(found.get("params"), "params")
    if len(params) > _MOST_COLUMNS:
        raise ValueError(f"`params` must be at most {_MOST_COLUMNS} but got {len(params)}.")
    amounts = {
        _resource(name): _number(amount, name, 0.0)
        for name, amount in _mapping(found.get("usage"), "usage").items()
    }
    known = {name: amounts.pop(name) for name in USAGE_RESOURCES if name in amounts}
    return Point(
        params={name: _scalar(each, name) for name, each in params.items()},
        usage=Usage(**known, custom=amounts),
        censored=frozenset(_text(name, "censored") for name in _items(found, "censored")),
    )


def _model_object(model: ResourceModel) -> dict[str, Any]:
    return {
        "floor": model.floor,
        "location": model.location,
        "scale": model.scale,
        "target": model.sites.target.tolist(),
        "extra": model.sites.extra.tolist(),
        "censored": model.censored.tolist(),
        "hyperparameters": model.hyperparameters.values.tolist(),
    }


def _model(value: Any, known: np.ndarray, columns: np.ndarray) -> ResourceModel:
    found = _mapping(value, "model")
    n = int(known.sum())
    if n == 0:
        raise ValueError("A model must have points but has none.")
    censored = _items(found, "censored")
    if len(censored) != n or not all(isinstance(each, bool) for each in censored):
        raise ValueError(f"`censored` must be {n} booleans but got {censored!r}.")
    values = _numbers(found, "hyperparameters", 3 + columns.shape[1], -_LARGEST_LOG, _LARGEST_LOG)
    return ResourceModel(
        columns=columns[known],
        floor=_number(found.get("floor"), "floor"),
        location=_number(found.get("location"), "location", -1e3, 1e3),
        scale=_number(found.get("scale"), "scale", 1e-9, 1e3),
        sites=Sites(
            _numbers(found, "target", n, -1e6, 1e6), _numbers(found, "extra", n, 0.0, 1e9)
        ),
        censored=np.array(censored, dtype=bool),
        hyperparameters=Hyperparameters(values),
    )


def _known(points: Sequence[Point], resource: str) -> np.ndarray:
    return np.array([point.usage.get(resource) is not None for point in points], dtype=bool)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be an object but got {_short(value)}.")
    return value


def _items(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list but got {_short(value)}.")
    return value


def _numbers(
    found: Mapping[str, Any], name: str, length: int, low: float, high: float
) -> np.ndarray:
    values = _items(found, name)
    if len(values) != length:
        raise ValueError(f"`{name}` must have {length} numbers but has {len(values)}.")
    return np.array([_number(value, name, low, high) for value in values], dtype=float)


def _number(value: Any, name: str, low: float = -_LARGEST, high: float = _LARGEST) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number but got {_short(value)}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be from {low:g} to {high:g} but got {_short(value)}.")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text but got {_short(value)}.")
    return value


def _resource(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"A resource must be named by an identifier but got {name!r}.")
    return name


def _scalar(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"`{name}` must be a number, text, a boolean or null but got {_short(value)}."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
