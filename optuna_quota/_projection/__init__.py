"""Will a strategy fit its quota: footprints summed over it, with a stated probability."""

from optuna_quota._projection.project_strategy import project
from optuna_quota._projection.project_strategy import project_end
from optuna_quota._projection.projection import describe_difference
from optuna_quota._projection.projection import describe_strategy
from optuna_quota._projection.projection import format_probability
from optuna_quota._projection.projection import ProjectedResource
from optuna_quota._projection.projection import Projection


__all__ = [
    "ProjectedResource",
    "Projection",
    "describe_difference",
    "describe_strategy",
    "format_probability",
    "project",
    "project_end",
]
