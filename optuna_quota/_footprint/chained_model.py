"""Clock time as CPU or GPU time by how fast that goes.

Clock time is noisy where a machine is shared, CPU time hardly, and their ratio depends on far
less. So ``log wall = log cpu + log(wall / cpu)``, each part a model of its own, learns from few
trials what a model of clock time alone would need many for. A trial that was stopped bounds its
CPU time, and still tells the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optuna_quota._footprint.predictive import Predictive
from optuna_quota._footprint.resource_model import ResourceModel


@dataclass(frozen=True)
class ChainedModel:
    """A resource as a base resource times a ratio.

    Attributes:
        on: The base resource.
        base: The model of the base resource.
        ratio: The model of amount over base amount.
    """

    on: str
    base: ResourceModel
    ratio: ResourceModel

    def predict(self, columns: np.ndarray, base: Predictive | None = None) -> Predictive:
        """Return what is expected at points, given what is of the base resource if known."""
        base = self.base.predict(columns) if base is None else base
        ratio = self.ratio.predict(columns)
        median = np.maximum(base.quantile(0.5), 1e-300)
        # To first order, a change of the part above the floor moves the logarithm by its share.
        share = np.minimum(np.exp(base.center) / median, 1.0)
        spread = np.hypot(share * base.spread, ratio.spread)
        center = np.log(median) + ratio.center
        return Predictive(0.0, center, spread, min(base.df, ratio.df))

    def draw(self, columns: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """Return joint draws at points, shape ``(count, n_points)``."""
        base = self.base.draw(columns, count, generator)
        return np.asarray(base * self.ratio.draw(columns, count, generator))


def chain_density(base: ResourceModel, ratio: ResourceModel, told: np.ndarray) -> float:
    """Return the leave-one-out log density of the logarithms of chained amounts.

    Args:
        base: The model of the base resource, on the same points as ``ratio``.
        ratio: The model of the ratio.
        told: True for the points that count.
    """
    (r0, v0), (r1, v1) = base.log_leave_one_out(), ratio.log_leave_one_out()
    return _density((r0 + r1)[told], (v0 + v1)[told])


def direct_density(model: ResourceModel, told: np.ndarray) -> float:
    """Return the same of a model that takes the resource by itself."""
    residual, variance = model.log_leave_one_out()
    return _density(residual[told], variance[told])


def _density(residual: np.ndarray, variance: np.ndarray) -> float:
    variance = np.maximum(variance, 1e-12)
    return float(-0.5 * np.sum(residual**2 / variance + np.log(variance)))
