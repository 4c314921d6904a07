"""What trials are expected to use, as stated or as an earlier study shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optuna_quota.cli.amounts import read_usage
from optuna_quota.cli.errors import UsageError


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._resources import Usage


def read_footprint(typed: str) -> Usage | Footprint:
    """Return the footprint that ``--footprint`` states.

    Args:
        typed: Such as ``"memory=2GiB,wall_time=90s"``, or the path of a file that
            ``Footprint.to_json`` or ``report --footprint`` wrote.

    Raises:
        UsageError: If it is none.
    """
    if "=" in typed and not Path(typed).is_file():
        return read_usage(typed)
    from optuna_quota._footprint.footprint import Footprint

    try:
        return Footprint.from_json(Path(typed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--footprint: {error}") from error


def learn_footprint(study: Study, confidence: float = 0.95) -> Footprint:
    """Return the footprint that a study's trials show.

    Args:
        study: The study.
        confidence: One-sided, of the bounds.

    Raises:
        UsageError: If no trial says what it used.
    """
    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._footprint.rows import footprint_row

    found = [footprint_row(trial) for trial in study.get_trials(deepcopy=False)]
    rows = [row for row in found if row is not None]
    if not rows:
        raise UsageError(
            f"No trial of the study {study.study_name!r} says what it used; state what each uses "
            "with `optuna-quota project --footprint`."
        )
    return Footprint.fit(rows, confidence=confidence)
