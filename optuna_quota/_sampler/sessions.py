"""The sessions of a sampler: each lives as long as any ``Study`` object that it served."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary
from weakref import WeakValueDictionary

from optuna_quota import _optuna


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._sampler.session import Session


class Sessions:
    """Finds the session of a study, which all ``Study`` objects on one storage object share.

    A service that loads its study again for each request makes a storage each time. A session
    holds on to the storage, and so to its connections, but not to the study.
    """

    def __init__(self) -> None:
        self._by_study: WeakKeyDictionary[Study, Session] = WeakKeyDictionary()
        self._by_place: WeakValueDictionary[tuple[int, int, int], Session] = WeakValueDictionary()

    def find(self, study: Study) -> Session | None:
        """Return the session of a study, None where there is none in this process."""
        session = self._by_place.get(_place(study))
        if session is not None and self._by_study.get(study) is not session:
            self.add(study, session)
        return session

    def add(self, study: Study, session: Session) -> None:
        """Keep a session for as long as a ``Study`` object lives."""
        self._by_study[study] = session
        self._by_place[_place(study)] = session
        session.ledger.serve(study)


def _place(study: Study) -> tuple[int, int, int]:
    # A forked process keeps nothing of its parent's.
    return os.getpid(), id(_optuna.storage_of(study)), _optuna.study_id_of(study)
