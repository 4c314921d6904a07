"""Values that say what is allowed, what is planned and what was used.

All are frozen, validated once at construction, comparable, hashable, and can be pickled. Numbers
inside are SI base units: bytes, seconds, joules.
"""

from __future__ import annotations

from optuna_quota._resources.breach import Breach
from optuna_quota._resources.limits import Limits
from optuna_quota._resources.quota import Quota
from optuna_quota._resources.resource import format_amount
from optuna_quota._resources.resource import get_resource
from optuna_quota._resources.resource import HELD_RESOURCES
from optuna_quota._resources.resource import LIMIT_RESOURCES
from optuna_quota._resources.resource import PRICED_RESOURCES
from optuna_quota._resources.resource import Resource
from optuna_quota._resources.resource import RESOURCES
from optuna_quota._resources.resource import TOTAL_RESOURCES
from optuna_quota._resources.resource import USAGE_RESOURCES
from optuna_quota._resources.strategy import Strategy
from optuna_quota._resources.usage import Isolation
from optuna_quota._resources.usage import Outcome
from optuna_quota._resources.usage import OUTCOMES
from optuna_quota._resources.usage import Usage


__all__ = [
    "HELD_RESOURCES",
    "LIMIT_RESOURCES",
    "OUTCOMES",
    "PRICED_RESOURCES",
    "RESOURCES",
    "TOTAL_RESOURCES",
    "USAGE_RESOURCES",
    "Breach",
    "Isolation",
    "Limits",
    "Outcome",
    "Quota",
    "Resource",
    "Strategy",
    "Usage",
    "format_amount",
    "get_resource",
]
