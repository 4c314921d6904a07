"""What this host can enforce and measure, what degrades and how to fix it.

Facts are read or tried at the edge (``read_…``, ``run_attempts``) and judged by pure functions
(``judge_…``) into findings.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

from optuna_quota._doctor.attempts import run_attempts
from optuna_quota._doctor.cgroups import read_cgroup
from optuna_quota._doctor.finding import Finding
from optuna_quota._doctor.gpus import judge_gpus
from optuna_quota._doctor.gpus import read_gpus
from optuna_quota._doctor.host import judge_host
from optuna_quota._doctor.host import read_host
from optuna_quota._doctor.measuring import judge_processes
from optuna_quota._doctor.measuring import judge_rapl
from optuna_quota._doctor.measuring import try_rapl
from optuna_quota._doctor.software import judge_versions
from optuna_quota._doctor.software import read_versions
from optuna_quota._doctor.stopping import judge_stopping
from optuna_quota._doctor.storage import judge_storage
from optuna_quota._doctor.storage import read_storage


if TYPE_CHECKING:
    from optuna.storages import BaseStorage


__all__ = ["Finding", "examine_host", "examine_storage"]


def examine_host() -> list[Finding]:
    """Return what was found, area by area; takes some tens of milliseconds."""
    attempts = run_attempts()
    start_methods = tuple(multiprocessing.get_all_start_methods())
    return [
        *judge_stopping(attempts, read_cgroup(), start_methods),
        *judge_processes(attempts),
        judge_rapl(try_rapl()),
        *judge_gpus(*read_gpus()),
        *judge_host(read_host()),
        *judge_versions(read_versions()),
    ]


def examine_storage(storage: BaseStorage) -> list[Finding]:
    """Return what a storage means for a quota over many workers.

    Args:
        storage: The storage; what it raises when it doesn't answer comes through.
    """
    return judge_storage(read_storage(storage))
