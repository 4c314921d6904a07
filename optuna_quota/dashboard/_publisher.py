"""A callback that keeps optuna-dashboard current while a study runs."""

from __future__ import annotations

import logging
from threading import Lock
import time
from typing import Any
from typing import TYPE_CHECKING
import uuid

from optuna_quota import _optuna
from optuna_quota import _records
from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._utilization.data import study_data
from optuna_quota.dashboard._publish import publish_data
from optuna_quota.visualization._data import report_data


if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.study import Study
    from optuna.trial import FrozenTrial


_logger = logging.getLogger("optuna.quota.dashboard")

# Publishing takes at most this share of the time.
_SHARE = 0.02


class Publisher:
    """Keeps a study's page in optuna-dashboard current: give it to ``study.optimize``.

    It publishes when a trial has ended and at least ``interval`` seconds have passed, and rests
    fifty times as long as publishing took, so that it costs at most 2% of the time. Of many
    workers that each have one, one publishes at a time. It never fails a study: what goes wrong
    is logged as a warning.

    Example:

        .. code-block:: python

            from optuna_quota import analyze
            from optuna_quota.dashboard import Publisher

            study.optimize(objective, n_trials=200, callbacks=[Publisher()])
            analyze(study).publish()  # the last trials too

    Args:
        artifact_store: The store that the dashboard is started with, for pictures.
        interval: Seconds between publications, at least.

    Raises:
        ValueError: If ``interval`` is negative.
    """

    def __init__(
        self, *, artifact_store: ArtifactStore | None = None, interval: float = 30.0
    ) -> None:
        if not interval >= 0:
            raise ValueError(f"`interval` must be nonnegative but got {interval!r}.")
        self._artifact_store = artifact_store
        self._interval = interval
        self._next = 0.0
        self._lock = Lock()

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Publish if it is time to."""
        if time.monotonic() < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            self._publish(study)
        except Exception:  # a picture must never cost a study its trials
            _logger.warning("Publishing into optuna-dashboard failed.", exc_info=True)
            self._next = time.monotonic() + self._interval
        finally:
            self._lock.release()

    def _publish(self, study: Study) -> None:
        begun = time.monotonic()
        claim = _Claim(study)
        if claim.taken(self._interval):
            self._next = begun + self._interval
            return
        claim.take()
        report = StudyAnalysis(study, study_data(study))
        publish_data(report_data(study, report), self._artifact_store, claim.ours)
        ended = time.monotonic()
        self._next = ended + max(self._interval, (ended - begun) / _SHARE)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


class _Claim:
    """Which worker publishes: the last to write its claim, if none did within the interval.

    Two that read the storage in the same instant may both claim; each asks again, once all is made
    and before it writes, whether the claim is still its own.
    """

    def __init__(self, study: Study) -> None:
        self._storage = _optuna.storage_of(study)
        self._study_id = _optuna.study_id_of(study)
        self._token = uuid.uuid4().hex

    def taken(self, interval: float) -> bool:
        at = self._read()[0]
        return 0 <= time.time() - at < interval

    def take(self) -> None:
        value: list[float | str] = [time.time(), self._token]
        self._storage.set_study_system_attr(self._study_id, _records.STUDY_PUBLISHED, value)

    def ours(self) -> bool:
        return self._read()[1] == self._token

    def _read(self) -> tuple[float, str]:
        attributes = self._storage.get_study_system_attrs(self._study_id)
        value = attributes.get(_records.STUDY_PUBLISHED)
        if not isinstance(value, list) or len(value) != 2:
            return 0.0, ""
        return _records.number(value[0]) or 0.0, str(value[1])
