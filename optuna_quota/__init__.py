"""Keeps Optuna studies inside their computing-resource quotas.

It **rejects** what will not fit before it runs, **terminates** what outgrows its limits while it
runs, and **learns** from every finished trial how hyperparameters drive resource use, so that the
next projection is better.

Example:

    .. code-block:: python

        import optuna
        from optuna_quota import Limits, Quota, QuotaPruner, QuotaSampler, analyze, isolated

        study = optuna.create_study(
            sampler=QuotaSampler(quota=Quota(wall_time="2h", cpu_time="6h")),
            pruner=QuotaPruner(limits=Limits(memory="4GiB", wall_time="5min")),
        )
        study.optimize(isolated(objective), n_trials=200)
        print(analyze(study).summary())

The terms: a **quota** is a ceiling on a whole study, a **limit** one on one trial. **Usage** is
what was measured, a **footprint** what is expected before it runs, a **projection** the footprints
summed over a **strategy**. To **reject** is never to run, to **prune** to stop on an intermediate
value, to **terminate** to stop because of a **breach**, usage over a limit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TYPE_CHECKING

from optuna_quota._version import __version__


if TYPE_CHECKING:
    from optuna_quota._analysis.replay import replay, ReplayReport
    from optuna_quota._enforcement.preemptible import preemptible
    from optuna_quota._enforcement.pruner import check, QuotaPruner
    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._isolation.isolated import isolated, script
    from optuna_quota._ledger.status import LedgerStatus, status
    from optuna_quota._limits import Limits, Quota, Strategy
    from optuna_quota._metering import Meter
    from optuna_quota._projection.projection import Projection
    from optuna_quota._projection.simulation import project
    from optuna_quota._report import analyze, UtilizationReport
    from optuna_quota._sampler.sampler import QuotaSampler
    from optuna_quota._table import trial_table
    from optuna_quota._usage import Usage
    from optuna_quota.exceptions import (
        LimitBreached,
        QuotaError,
        QuotaExhausted,
        StudyRejected,
        TrialCrashed,
        TrialPreempted,
        TrialRejected,
    )


# Where each public name lives. Modules are imported when a name is first asked for, so that
# `import optuna_quota` costs next to nothing and statsmodels or plotly load only where used.
_HOMES = {
    name: module
    for module, names in {
        "_analysis.replay": "replay ReplayReport",
        "_enforcement.preemptible": "preemptible",
        "_enforcement.pruner": "check QuotaPruner",
        "_footprint.footprint": "Footprint",
        "_isolation.isolated": "isolated script",
        "_ledger.status": "LedgerStatus status",
        "_limits": "Limits Quota Strategy",
        "_metering": "Meter",
        "_projection.projection": "Projection",
        "_projection.simulation": "project",
        "_report": "analyze UtilizationReport",
        "_sampler.sampler": "QuotaSampler",
        "_table": "trial_table",
        "_usage": "Usage",
        "exceptions": "LimitBreached QuotaError QuotaExhausted StudyRejected TrialCrashed "
        "TrialPreempted TrialRejected",
    }.items()
    for name in names.split()
}

__all__ = [
    "Footprint",
    "LedgerStatus",
    "LimitBreached",
    "Limits",
    "Meter",
    "Projection",
    "Quota",
    "QuotaError",
    "QuotaExhausted",
    "QuotaPruner",
    "QuotaSampler",
    "ReplayReport",
    "Strategy",
    "StudyRejected",
    "TrialCrashed",
    "TrialPreempted",
    "TrialRejected",
    "Usage",
    "UtilizationReport",
    "__version__",
    "analyze",
    "check",
    "isolated",
    "preemptible",
    "project",
    "replay",
    "script",
    "status",
    "trial_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
