"""Objectives with a cost, half of whose space is over the limit, for ``point_admission.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
import itertools
import json
import os
from pathlib import Path
import tempfile
import time
from typing import Any

import numpy as np
import optuna


@dataclass(frozen=True)
class Surface:
    """An objective with a cost.

    Attributes:
        suggest: Suggests a point.
        cost: The cost of a point.
        loss: The value of a point.
        limit: The limit on the cost.
        worst: The best value of a study before its first result.
    """

    suggest: Callable[[optuna.Trial], dict[str, Any]]
    cost: Callable[[Mapping[str, Any]], float]
    loss: Callable[[Mapping[str, Any]], float]
    limit: float
    worst: float


def synthetic() -> Surface:
    limit = 2_000.0

    def suggest(trial: optuna.Trial) -> dict[str, Any]:
        return {
            "width": trial.suggest_int("width", 8, 1024, log=True),
            "depth": trial.suggest_int("depth", 1, 8),
            "rate": trial.suggest_float("rate", 1e-4, 1.0, log=True),
            "kind": trial.suggest_categorical("kind", ["a", "b"]),
        }

    def cost(params: Mapping[str, Any]) -> float:
        factor = 1.6 if params["kind"] == "b" else 1.0
        return float(100 + 1.2 * params["width"] ** 1.2 * params["depth"] * factor)

    def loss(params: Mapping[str, Any]) -> float:
        # More work helps up to 90% of the limit; rate and kind have effects of their own.
        effort = np.log(cost(params) / (0.9 * limit))
        rate = np.log10(params["rate"]) + 2.0
        return float(0.5 * effort**2 + 0.3 * rate**2 + 0.1 * (params["kind"] == "a"))

    return Surface(suggest, cost, loss, limit, 5.0)


TREES = (4, 8, 16, 32, 64, 128)
DEPTHS = (2, 5, 8, 11, 14)
FEATURES = (0.05, 0.15, 0.25, 0.35)
ROWS = (0.1, 0.4, 0.7, 1.0)
LEAVES = (1, 3, 9)


def forest() -> Surface:
    table = {tuple(point): (cost, loss) for point, cost, loss in json.loads(_table().read_text())}

    def key(params: Mapping[str, Any]) -> tuple[float, ...]:
        near = FEATURES[round((params["features"] - 0.05) / 0.1)]
        share = ROWS[round((params["rows"] - 0.1) / 0.3)]
        return (2 ** params["log2_trees"], params["depth"], near, share, params["leaf"])

    def suggest(trial: optuna.Trial) -> dict[str, Any]:
        return {
            "log2_trees": trial.suggest_int("log2_trees", 2, 7),
            "depth": trial.suggest_int("depth", 2, 14, step=3),
            "features": trial.suggest_float("features", 0.05, 0.35, step=0.1),
            "rows": trial.suggest_float("rows", 0.1, 1.0, step=0.3),
            "leaf": trial.suggest_categorical("leaf", list(LEAVES)),
        }

    costs, losses = np.array(list(table.values())).T
    return Surface(
        suggest,
        lambda params: table[key(params)][0],
        lambda params: table[key(params)][1],
        float(np.median(costs)),
        float(losses.max()),
    )


def _table() -> Path:
    return Path(tempfile.gettempdir()) / f"forest-table-{os.getuid()}.json"


def measure_forests() -> None:
    """Measure each point of the grid once, unless an earlier run did."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split

    if _table().exists():
        print(f"forest: measured earlier, in {_table()}")
        return
    images, digits = load_digits(return_X_y=True)
    x, other_x, y, other_y = train_test_split(
        images, digits, test_size=0.4, random_state=0, stratify=digits
    )
    found = []
    grid = itertools.product(TREES, DEPTHS, FEATURES, ROWS, LEAVES)
    for trees, depth, features, rows, leaf in grid:
        n = int(rows * len(x))
        model = RandomForestClassifier(
            trees, max_depth=depth, max_features=features, min_samples_leaf=leaf, random_state=0
        )
        begin = time.process_time()
        model.fit(x[:n], y[:n])
        cost = time.process_time() - begin
        loss = log_loss(other_y, model.predict_proba(other_x), labels=range(10))
        found.append(((trees, depth, features, rows, leaf), cost, loss))
    _table().write_text(json.dumps(found))


SURFACES = {"synthetic": synthetic, "forest": forest}
