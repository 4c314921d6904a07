"""Publishing a study, once and while it runs."""

from __future__ import annotations

from collections.abc import Iterator
import json
import logging
import os
from pathlib import Path
import pickle
import re
import sys
import threading
from typing import Any
from xml.etree import ElementTree

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import FloatDistribution
from optuna_dashboard import get_note, save_note
import pandas as pd
import pytest

from optuna_quota import analyze, dashboard, Limits, Quota, Usage
from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._optuna import storage_of, study_id_of
from optuna_quota._records import Interval, TrialRecord
from optuna_quota._usage import Breach
from optuna_quota.dashboard import END, IMAGE, publish, publish_report, Publisher
from tests.dashboard_tests.notes import block_of
from tests.visualization_tests.studies import add_row, empty_study, made_study


GIB = 2**30


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package look as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None if name == package else True)


def test_without_plotly_the_notes_are_published(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = made_study(3)
    without(monkeypatch, "plotly")
    analyze(study).publish()
    assert END in get_note(study)
    assert not any("plot_data" in key for key in attributes(study))
    assert "Published without plots" in caplog.text and "optuna-quota[plot]" in caplog.text


def test_a_report_of_a_copy_is_published_in_the_study_that_is_given() -> None:
    study, copy = made_study(3), made_study(3)
    publish(study, report=analyze(copy))
    assert END in get_note(study)
    assert END not in (get_note(copy) or "")


def test_a_report_of_a_copy_is_published_with_the_ledger_and_limits_that_are_given() -> None:
    limits, quotas = Limits(memory="1GiB"), [Quota(cpu_time="7h"), Quota(wall_time="5h")]
    study = made_study(12, quota=quotas[0], limits=limits)
    copy = made_study(12, quota=quotas[1], limits=Limits(memory="3GiB"))
    report = analyze(copy)
    assert "12 trials" in report.summary()
    publish(study, report=report)
    ledger = get_note(study).replace("\u00a0", " ")
    assert "7 h" in ledger and "5 h" not in ledger
    assert "Limits on a trial: memory 1 GiB." in ledger
    budget = plots(study)["optuna_quota.budget"]["data"]
    assert {trace["name"].split(",")[0] for trace in budget} == {"CPU time"}


@pytest.mark.parametrize("how", ["publish", "Publisher"])
def test_without_optuna_dashboard_the_log_says_what_to_install(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = made_study(3)
    without(monkeypatch, "optuna_dashboard")
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)  # plotly neither
    if how == "publish":
        analyze(study).publish()
    else:
        publisher = Publisher(interval=0)
        for _ in range(2):
            publisher(study, study.trials[0])
    assert caplog.text.count("pip install 'optuna-quota[dashboard]'") == 1
    assert "Published" not in caplog.text


PERSON = "# Mine\n\nMy own thoughts."


@pytest.fixture(params=["memory", "sqlite", "journal", "postgresql", "mysql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield optuna.storages.InMemoryStorage()
    elif request.param == "journal":
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
        yield optuna.storages.JournalStorage(backend)
    else:
        made = optuna.storages.RDBStorage(url_of(request.param, tmp_path))
        yield made
        made.engine.dispose()


def url_of(kind: str, folder: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{folder / 'study.db'}"
    name = f"OPTUNA_QUOTA_TEST_{kind.upper()}_URL"
    if not os.environ.get(name):
        pytest.skip(f"{name} is not set")
    return os.environ[name]


def attributes(study: optuna.Study) -> dict[str, Any]:
    return dict(storage_of(study).get_study_system_attrs(study_id_of(study)))


def publish_plain(study: optuna.Study, store: Any = None) -> None:
    """Publish without analyzing, which takes seconds and is tested elsewhere."""
    report = StudyAnalysis(study)
    nothing = pd.DataFrame({"param": [], "resource": []})
    found = {"correlations": nothing, "drivers": {}, "advice": [], "cheaper_space": None}
    vars(report).update(found, _fitted=({}, {}), prediction_errors={})
    publish_report(report, store)


def plots(study: optuna.Study) -> dict[str, Any]:
    found: dict[str, str] = {}
    for key, value in sorted(
        attributes(study).items(),
        key=lambda kv: int(kv[0].rsplit(":", 1)[1]) if "plot" in kv[0] else 0,
    ):
        if key.startswith("dashboard:plot_data:"):
            name = key.split(":")[2]
            found[name] = found.get(name, "") + value
    return {name: json.loads(text) for name, text in found.items()}


@pytest.mark.slow
def test_publishing_again_replaces_on_any_storage(storage: Any, tmp_path: Path) -> None:
    study = made_study(30, storage=storage)
    store = FileSystemArtifactStore(str(tmp_path))
    save_note(study, PERSON)
    report = analyze(study)
    publish(study, report, artifact_store=store)
    first = attributes(study)
    assert get_note(study).startswith(PERSON)
    assert "Ledger" in (block_of(get_note(study)) or "")
    assert len(plots(study)) == 4
    publish(study, report, artifact_store=store)
    assert attributes(study) == first
    ended = [t for t in study.trials if t.user_attrs["quota:outcome"] == "terminated"]
    assert ended
    assert len([p for p in tmp_path.iterdir() if len(p.name) == 36]) == len(ended)
    optuna.delete_study(study_name=study.study_name, storage=storage)


@pytest.mark.slow
def test_text_that_a_person_adds_later_is_kept() -> None:
    study = made_study(12)
    publish(study)
    note = get_note(study)
    save_note(study, f"above\n\n{note}\nbelow")
    add_row(study, TrialRecord(Usage(memory=GIB, wall_time=3), "completed"))
    publish(study)
    renewed = get_note(study)
    assert renewed.startswith("above\n\n") and renewed.endswith("\nbelow")
    assert "13 trials finished" in renewed and "12 trials finished" not in renewed


def test_a_trials_note_has_its_reason_usage_and_image(tmp_path: Path) -> None:
    study = empty_study(limits=Limits(memory="1GiB", wall_time="1min"))
    breach = Breach("memory", GIB, 1.25 * GIB, 4.0)
    line = ((0.0, 0.1 * GIB), (2.0, 0.5 * GIB), (4.0, 1.25 * GIB))
    usage = Usage(memory=1.25 * GIB, wall_time=4.2)
    footprint = {"wall_time": Interval(2, 3, 4), "memory": Interval(GIB / 4, GIB / 2, GIB)}
    record = TrialRecord(usage, "terminated", breach.reason, breach, footprint, timeline=line)
    add_row(study, record)
    add_row(study, TrialRecord(usage, "completed"))
    publish(study, artifact_store=FileSystemArtifactStore(str(tmp_path)))
    found = attributes(study)
    text = found["dashboard:0:note_str:0"].replace("\u00a0", " ")
    used, projected = text.split("\n\nProjected before it ran:\n\n")
    assert "125%" in used and projected.index("512 MiB") < projected.index("3 s")
    assert "**Terminated.** Memory limit exceeded after" in text and "1.25 GiB used" in text
    assert "125%" in text and "≥ 4.2 s" in text
    assert "dashboard:1:note_str:0" not in found
    (key,) = (k for k in found if k.startswith("dashboard:artifacts:0:"))
    meta = json.loads(found[key])
    assert meta["filename"] == IMAGE and meta["mimetype"] == "image/svg+xml"
    assert f"/artifacts/0/0/{meta['artifact_id']}" in text
    svg = (tmp_path / meta["artifact_id"]).read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "limit 1 GiB" in svg and "script" not in svg


def test_a_trial_that_was_stopped_before_it_held_any_memory_has_a_note(tmp_path: Path) -> None:
    study = empty_study(limits=Limits(wall_time=1))
    breach = Breach("wall_time", 1.0, 1.1, 1.1)
    usage = Usage(memory=0, wall_time=1.1)
    add_row(study, TrialRecord(usage, "terminated", breach.reason, breach, timeline=((1.1, 0),)))
    publish(study, artifact_store=FileSystemArtifactStore(str(tmp_path)))
    assert "Time limit of 1 s exceeded" in attributes(study)["dashboard:0:note_str:0"].replace(
        "\u00a0", " "
    )
    assert not list(tmp_path.iterdir())


def test_a_rejected_trials_note_has_its_projection() -> None:
    study = made_study(60)
    publish_plain(study)
    number = next(t.number for t in study.trials if t.user_attrs["quota:outcome"] == "rejected")
    text = attributes(study)[f"dashboard:{number}:note_str:0"]
    assert "**Rejected.**" in text and "GiB" in text
    assert text.count("| :--- |") == 1 and "Projected before it ran:\n\n|" in text


def test_hostile_attributes_do_not_become_markup() -> None:
    name = "<img src=x onerror=alert(1)>|`"
    space = {name: FloatDistribution(0.1, 1)}
    study = empty_study(limits=Limits(memory="1GiB"))
    reason = "<script>alert(1)</script> [x](javascript:alert(1)) | https://evil.example\n# h"
    breach = Breach("memory", GIB, 2 * GIB, 1.0)
    for n in range(30):
        memory = GIB * (0.1 + n / 40)
        record = TrialRecord(Usage(memory=memory, wall_time=1 + n), "completed")
        add_row(study, record, params={name: 0.1 + n / 40}, space=space)
    record = TrialRecord(Usage(memory=2 * GIB), "terminated", reason, breach)
    add_row(study, record, params={name: 1.0}, space=space)
    publish(study)
    found = attributes(study)
    for text in (get_note(study), found["dashboard:30:note_str:0"]):
        plain = text.replace("\\<", "").replace("\\`", "")
        outside_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", plain)
        assert "<script" not in outside_code and "<img" not in outside_code
        assert "[x](" not in text.replace("\\[", "").replace("\\]", "")
        assert "https://evil" not in text and "\n# h" not in text
    for figure in plots(study).values():
        assert "<img" not in json.dumps(figure)


@pytest.mark.slow
def test_plots_stay_small_on_many_trials() -> None:
    study = made_study(2000)
    publish_plain(study)
    for name, figure in plots(study).items():
        assert len(json.dumps(figure)) < 50_000, name
    shown = plots(study)["optuna_quota.usage"]["data"]
    assert {t["name"].split()[0] for t in shown} >= {"completed", "terminated", "rejected"}
    notes = [k for k in attributes(study) if k.endswith(":note_ver") and k.count(":") == 2]
    assert len(notes) == 100


@pytest.mark.parametrize("ended_by", ["memory", "wall_time"])
def test_plots_are_of_the_resource_that_ended_most_trials(ended_by: str) -> None:
    study = empty_study(limits=Limits(memory="1GiB", wall_time="10s"))
    other = {"memory": "wall_time", "wall_time": "memory"}[ended_by]
    for resource in [ended_by, other, ended_by]:
        breach = Breach(resource, 10.0, 11.0, 5.0)
        usage = Usage(memory=2**29, wall_time=8.0)
        add_row(study, TrialRecord(usage=usage, outcome="terminated", breach=breach))
    publish_plain(study)
    titles = plots(study)["optuna_quota.usage"]["layout"]["title"]["text"]
    assert ("Memory" if ended_by == "memory" else "Wall time") in titles


@pytest.mark.parametrize("n_trials", [0, 1])
def test_studies_with_few_trials_are_published(n_trials: int) -> None:
    study = made_study(n_trials) if n_trials else empty_study()
    publish(study)
    assert "Resource usage" in get_note(study)


def test_a_study_never_run_with_this_library_is_published() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda t: (t.suggest_float("x", 0, 1), 1.0), n_trials=5)
    publish(study)
    assert "5 trials finished: 5 completed" in get_note(study)


def test_a_deleted_image_is_uploaded_again(tmp_path: Path) -> None:
    study = made_study(25)
    store = FileSystemArtifactStore(str(tmp_path))
    publish_plain(study, store)
    key = next(k for k in attributes(study) if k.startswith("dashboard:artifacts:"))
    storage_of(study).set_study_system_attr(study_id_of(study), key, "null")
    before = len(list(tmp_path.iterdir()))
    publish_plain(study, store)
    assert len(list(tmp_path.iterdir())) == before + 1


@pytest.mark.parametrize("value", ["{", "[1]", "3", 7, None, {"body": 1}])
def test_corrupt_attributes_of_the_dashboard_are_replaced(value: Any, tmp_path: Path) -> None:
    study = made_study(25)
    store = FileSystemArtifactStore(str(tmp_path))
    publish_plain(study, store)
    whole = attributes(study)
    storage, study_id = storage_of(study), study_id_of(study)
    ours = [key for key in whole if key.startswith("dashboard:")]
    assert len({key.split(":")[1] for key in ours}) > 3
    for key in ours:
        storage.set_study_system_attr(study_id, key, value)
    publish_plain(study, store)
    assert block_of(get_note(study)) is not None
    assert plots(study).keys() == {k.split(":")[2] for k in whole if "plot_data" in k}


def test_an_image_url_is_no_markup(tmp_path: Path) -> None:
    study = made_study(25)
    publish_plain(study)
    trial = next(t for t in study.trials if t.user_attrs["quota:outcome"] == "terminated")
    evil = f"dashboard:artifacts:{trial._trial_id}:x) [click](https://evil.example"
    meta = json.dumps({"artifact_id": "x", "filename": IMAGE})
    storage_of(study).set_study_system_attr(study_id_of(study), evil, meta)
    publish_plain(study, FileSystemArtifactStore(str(tmp_path)))
    assert "evil" not in str([v for k, v in attributes(study).items() if "note_str" in k])


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


def test_the_publisher_is_throttled() -> None:
    study = optuna.create_study()
    study.optimize(objective, n_trials=40, callbacks=[Publisher(interval=3600)])
    assert count_versions(study) == 1
    assert "1 trial finished" in get_note(study)


def test_the_publisher_pauses_long_after_a_slow_publication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])

    def slow(*args: Any) -> None:
        now[0] += 2.0

    monkeypatch.setattr(dashboard, "publish_report", slow)
    study = made_study(3)
    publisher = Publisher(interval=1)
    now[0] = 10.0
    publisher(study, study.trials[0])
    assert publisher._next == pytest.approx(12.0 + 50 * 2.0)


def test_the_analysis_is_done_before_asking_whether_another_worker_publishes() -> None:
    study = made_study(3)
    report = StudyAnalysis(study)
    known: list[set[str]] = []

    def is_current() -> bool:
        known.append(set(vars(report)))
        return True

    publish_report(report, None, is_current)
    assert known == [set(vars(report))]


@pytest.mark.slow
def test_one_of_many_workers_publishes(tmp_path: Path) -> None:
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


def test_an_error_of_publishing_is_logged_and_fails_no_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(dashboard, "publish_report", fail)
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    study = optuna.create_study()
    study.optimize(objective, n_trials=3, callbacks=[Publisher(interval=0)])
    assert len(study.trials) == 3
    assert "Publishing to optuna-dashboard failed" in caplog.text


def test_a_publisher_can_be_pickled() -> None:
    study = made_study(2)
    again: Publisher = pickle.loads(pickle.dumps(Publisher(interval=0)))
    again(study, study.trials[0])
    assert "2 trials finished" in get_note(study)


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`interval` must be nonnegative but got -1"):
        Publisher(interval=-1)
