"""Studies in which points are ranked: what tests of the choice and of its trials share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import create_trial

from optuna_quota import Quota, QuotaSampler
from optuna_quota._sampler.ranking import Row


SPACE = {"x": FloatDistribution(0.0, 1.0), "dear": FloatDistribution(0.0, 1.0)}
BUDGET = 1_000.0


def cost_of(params: Mapping[str, Any]) -> float:
    return float(math.exp(3 * params["dear"]))


def medians(points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {"cpu_time": np.array([cost_of(point) for point in points])}


def rows(count: int, optimum: float = 0.7) -> list[Row]:
    """Return trials of random points, none of them next to the optimum."""
    drawn = np.random.default_rng(0).random((count, 2)) * (0.9, 1.0)
    drawn[:, 0] += 0.1 * (drawn[:, 0] > optimum - 0.05)
    return [Row({"x": x, "dear": d}, SPACE, (x - optimum) ** 2) for x, d in drawn]


class Offers(RandomSampler):
    """Offers these points in turn, over and over, in whole or one parameter at a time."""

    def __init__(self, *points: dict[str, Any]) -> None:
        super().__init__(seed=0)
        self.points, self.n_drawn = points, 0

    def sample_independent(
        self, study: Any, trial: Any, param_name: str, param_distribution: Any
    ) -> Any:
        point = self.points[self.n_drawn // len(SPACE) % len(self.points)]
        self.n_drawn += 1
        return point[param_name]


def run_study(
    base: BaseSampler,
    n_trials: int,
    *,
    n_candidates: int = 8,
    optimum: float = 0.7,
    earlier: int = 0,
    sign: float = 1.0,
    arguments: dict[str, Any] | None = None,
    **create: Any,
) -> optuna.Study:
    """Return a study of ``sign * (x - optimum)²``, after earlier random trials."""
    sampler = QuotaSampler(
        base,
        metering="reported",
        n_candidates=n_candidates,
        **{"quota": Quota(cpu_time=BUDGET), **(arguments or {})},
    )
    study = optuna.create_study(sampler=sampler, **create)
    for row in rows(earlier, optimum):
        usage = {"quota:cpu_time": cost_of(row.params), "quota:outcome": "completed"}
        study.add_trial(
            create_trial(
                params=dict(row.params),
                distributions=SPACE,
                value=sign * row.loss,
                user_attrs=usage,
            )
        )

    def objective(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_float(name, 0.0, 1.0) for name in SPACE}
        trial.set_user_attr("quota:cpu_time", cost_of(params))
        return sign * (params["x"] - optimum) ** 2

    study.optimize(objective, n_trials=n_trials)
    return study


def points_of(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]
