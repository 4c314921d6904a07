from __future__ import annotations

import logging
from pathlib import Path
import pickle
import threading
from typing import Any

import optuna
from optuna_dashboard import get_note
import pytest

from optuna_quota.dashboard import _publish
from optuna_quota.dashboard import Publisher
from optuna_quota.dashboard._notes import END
from tests.visualization_tests.studies import made_study


def objective(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1) ** 2


def count_versions(study: optuna.Study) -> int:
    storage = study._storage
    attributes = storage.get_study_system_attrs(study._study_id)
    return int(attributes.get("dashboard:note_ver", 0))


def test_the_note_is_current_while_the_study_runs() -> None:
    study = optuna.create_study()
    seen: list[str] = []
    callbacks: list[Any] = [
        Publisher(interval=0),
        lambda study, trial: seen.append(get_note(study)),
    ]
    study.optimize(objective, n_trials=1, callbacks=callbacks)
    assert "1 trial finished" in seen[0]


def test_it_is_throttled() -> None:
    study = optuna.create_study()
    study.optimize(objective, n_trials=40, callbacks=[Publisher(interval=3600)])
    assert count_versions(study) == 1
    assert "1 trial finished" in get_note(study)


def test_it_rests_long_after_a_slow_publication(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(_publish.time, "monotonic", lambda: now[0])

    def slow(*args: Any) -> None:
        now[0] += 2.0

    monkeypatch.setattr(_publish, "publish_data", slow)
    study = made_study(3)
    publisher = Publisher(interval=1)
    now[0] = 10.0
    publisher(study, study.trials[0])
    assert publisher._next == pytest.approx(12.0 + 50 * 2.0)


def test_of_many_workers_one_publishes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = made_study(6, storage=url, name="s")
    publishers = [Publisher(interval=3600) for _ in range(4)]
    studies = [optuna.load_study(study_name="s", storage=url) for _ in publishers]
    trial = study.trials[0]
    barrier = threading.Barrier(len(publishers))

    def work(publisher: Publisher, own: optuna.Study) -> None:
        barrier.wait(60)
        publisher(own, trial)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(publishers, studies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert count_versions(study) == 1
    assert get_note(study).count(END) == 1


def test_a_fault_is_logged_and_fails_no_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(_publish, "publish_data", fail)
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    study = optuna.create_study()
    study.optimize(objective, n_trials=3, callbacks=[Publisher(interval=0)])
    assert len(study.trials) == 3
    assert "Publishing into optuna-dashboard failed" in caplog.text


def test_it_can_be_pickled() -> None:
    study = made_study(2)
    again: Publisher = pickle.loads(pickle.dumps(Publisher(interval=0)))
    again(study, study.trials[0])
    assert "2 trials finished" in get_note(study)


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`interval` must be nonnegative but got -1"):
        Publisher(interval=-1)
