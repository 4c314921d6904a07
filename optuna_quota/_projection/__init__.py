"""Projects what a strategy will use, and the probability that it fits a quota."""

from optuna_quota._projection.project_strategy import project
from optuna_quota._projection.project_strategy import project_end
from optuna_quota._projection.projection import describe_nearest
from optuna_quota._projection.projection import describe_strategy
from optuna_quota._projection.projection import format_probability
from optuna_quota._projection.projection import ProjectedResource
from optuna_quota._projection.projection import Projection


__all__ = [
    "ProjectedResource",
    "Projection",
    "describe_nearest",
    "describe_strategy",
    "format_probability",
    "project",
    "project_end",
]
