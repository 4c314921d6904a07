"""Projects what a strategy will use, and the probability that it fits a quota."""

from optuna_quota._projection.project_strategy import project, project_end
from optuna_quota._projection.projection import (
    describe_nearest,
    describe_strategy,
    format_probability,
    ProjectedResource,
    Projection,
)


__all__ = [
    "ProjectedResource",
    "Projection",
    "describe_nearest",
    "describe_strategy",
    "format_probability",
    "project",
    "project_end",
]
