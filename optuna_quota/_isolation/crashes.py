"""Crashed trials: the value that lets ``optimize`` go on, and when too many have crashed.

Crashes are counted over the rows of the study and not in this process: a job array runs one trial
a process, and a study that is resumed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import math
from typing import Any
from typing import Literal
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from optuna_quota import _optuna
from optuna_quota._records import CRASHED
from optuna_quota._records import is_rejected
from optuna_quota._records import write_attributes
from optuna_quota._storage_retry import retry


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial


_logger = logging.getLogger("optuna.quota.isolated")

# A study is ended when so many trials, its first ones or any in a row, have all crashed.
FIRST_CRASHES = 3
CRASHES_IN_A_ROW = 5

Fate = Literal["crashed", "ended", "running"]


class CrashValue(float):
    """The value of a trial that has none: ``optimize`` fails the trial and goes on.

    To raise would end ``optimize``, since only its caller can say what it catches. A number, so
    that what users put around an objective, such as a minus sign, works. Optuna's log shows the
    reason: "The value nan (the trial's process …) is not acceptable."

    Args:
        reason: One sentence for a person.
    """

    def __new__(cls, reason: str) -> CrashValue:
        """Return a NaN."""
        return super().__new__(cls, math.nan)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __format__(self, spec: str) -> str:
        if spec:
            return super().__format__(spec)
        return f"nan ({self.reason[:1].lower()}{self.reason[1:].removesuffix('.')})"


def value_of_crash(reason: str, n_values: int) -> Any:
    """Return what stands for a crashed trial's value or values.

    Args:
        reason: One sentence for a person.
        n_values: The number of the study's directions.
    """
    value = CrashValue(reason)
    return value if n_values == 1 else (value, *[math.nan] * (n_values - 1))


def note_crash(study: Study, trial: Trial) -> None:
    """Write into a trial's row that its process crashed; a fault of the storage is logged."""
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    try:
        write_attributes(storage, trial_id, system={CRASHED: trial.number})
    except Exception as fault:  # noqa: BLE001 - any backend's own; the study goes on
        _logger.info(f"The crash of trial {trial.number} could not be recorded: {fault!r}.")


def find_crash_series(study: Study, number: int) -> str | None:
    """Return in words which trials have all crashed, None while that may be chance.

    Args:
        study: The study.
        number: The trial that has just crashed.
    """
    try:
        trials = retry(lambda: study.get_trials(deepcopy=False))
    except Exception as fault:  # noqa: BLE001 - any backend's own; the study goes on
        _logger.info(f"Crashed trials could not be counted: {fault!r}.")
        return None
    begun = [t for t in trials if t.state != TrialState.WAITING and not is_rejected(t.user_attrs)]
    fates: list[Fate] = ["crashed" if t.number == number else _fate_of(t) for t in begun]
    return describe_series(fates, [t.number for t in begun].index(number))


def _fate_of(trial: FrozenTrial) -> Fate:
    unfinished = trial.state in (TrialState.RUNNING, TrialState.FAIL)
    if unfinished and trial.system_attrs.get(CRASHED) == trial.number:
        return "crashed"
    return "ended" if trial.state.is_finished() else "running"


def describe_series(fates: Sequence[Fate], index: int) -> str | None:
    """Return in words which trials have all crashed, None while that may be chance.

    Args:
        fates: What came of the trials that have begun, in their order.
        index: The one that has just crashed.
    """
    in_a_row = 1
    for side in (reversed(fates[:index]), fates[index + 1 :]):
        for fate in side:
            if fate != "crashed":
                break
            in_a_row += 1
    if in_a_row >= CRASHES_IN_A_ROW:
        return f"{in_a_row} trials in a row have crashed"
    first = fates[:FIRST_CRASHES]
    if len(first) == FIRST_CRASHES and set(first) == {"crashed"} and "ended" not in fates:
        return f"The first {fates.count('crashed')} trials of the study have crashed"
    return None
