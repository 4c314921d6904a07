"""All advice of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.advise_budget import advise_budget
from optuna_quota._analysis.advise_budget import advise_last_tenth
from optuna_quota._analysis.advise_cheapest import advise_cheapest
from optuna_quota._analysis.advise_jobs import advise_jobs
from optuna_quota._analysis.advise_requests import advise_requests
from optuna_quota._analysis.advise_space import advise_space


if TYPE_CHECKING:
    from optuna_quota._analysis.report import UtilizationReport


def advise(report: UtilizationReport) -> list[Advice]:
    """Return what the data bear out, the most useful first; an empty list where nothing.

    Args:
        report: The analyzed study.
    """
    found = (
        advise_space(report),
        advise_requests(report),
        advise_jobs(report),
        advise_cheapest(report),
        advise_budget(report),
        advise_last_tenth(report),
    )
    return [advice for advices in found for advice in advices]
