"""Projects what a strategy will use, and the probability that it fits a quota."""

from optuna_quota._projection.project_strategy import project, project_end
from optuna_quota._projection.projection import (
    COLUMNS,
    describe_nearest,
    describe_probability,
    describe_resource,
    describe_strategy,
    format_probability,
    ProjectedResource,
    Projection,
)


__all__ = [
    "COLUMNS",
    "ProjectedResource",
    "Projection",
    "describe_nearest",
    "describe_probability",
    "describe_resource",
    "describe_strategy",
    "format_probability",
    "project",
    "project_end",
]
