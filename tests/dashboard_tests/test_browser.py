"""Real optuna-dashboard in a real browser, over a study that really ran."""

from __future__ import annotations

from collections.abc import Iterator
import time
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore
import optuna_dashboard
from optuna_dashboard import save_note
import pytest

from optuna_quota import analyze, isolated, Limits, Quota, QuotaPruner, QuotaSampler
from optuna_quota._records import PREFIX
from tests.browser import chromium, faults, served, wait_for


pytestmark = [pytest.mark.browser, pytest.mark.slow]

MIB = 2**20
PERSON = "What I think of it"
HOSTILE = "<img src=x onerror='window.hacked=1'>"


def objective(trial: optuna.Trial) -> float:
    held = trial.suggest_int("held", 1, 400)
    trial.suggest_categorical(HOSTILE, ["a", "b"])
    trial.report(float(held), 0)
    block = bytearray(held * MIB)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(0.1)
    return float(held)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[optuna.Study]:
    folder = tmp_path_factory.mktemp("dashboard")
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="browsed",
        sampler=QuotaSampler(optuna.samplers.RandomSampler(seed=1), quota=Quota(wall_time="1h")),
        pruner=QuotaPruner(optuna.pruners.NopPruner(), limits=Limits(memory="300MiB")),
    )
    for held in (20, 390, 60, 399, 5, 9, 30, 100):
        study.enqueue_trial({"held": held, HOSTILE: "a"})
    study.optimize(isolated(objective), n_trials=8)
    study.set_user_attr("folder", str(folder))
    yield study
    study._storage.remove_session()


@pytest.fixture(scope="module")
def address(study: optuna.Study) -> Iterator[str]:
    store = FileSystemArtifactStore(study.user_attrs["folder"])
    save_note(study, PERSON)
    report = analyze(study)
    report.publish(artifact_store=store)
    report.publish(artifact_store=store)
    application = optuna_dashboard.wsgi(study._storage, artifact_store=store)
    with served(application) as url:
        yield f"{url}/dashboard/studies/{study._study_id}"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


def breached(study: optuna.Study) -> list[int]:
    return [t.number for t in study.trials if t.user_attrs[f"{PREFIX}outcome"] == "terminated"]


def test_the_studys_page_has_four_plots(driver: Any, address: str) -> None:
    driver.get(address)
    titles = wait_for(
        driver,
        """const drawn = [...document.querySelectorAll('[id^="user-defined-plot:"]')]
             .filter(p => p.querySelector(".main-svg"));
           return drawn.length < 4 ? null : drawn.map(p => p.layout.title.text);""",
    )
    assert len(titles) == 4
    for start in ("Memory of each trial", "Quota left", "Quality against time"):
        assert any(start in title for title in titles)
    assert not faults(driver)


def test_breached_trials_are_seen_as_infeasible(
    driver: Any, address: str, study: optuna.Study
) -> None:
    driver.get(address)
    numbers = wait_for(
        driver,
        """const plot = document.getElementById("plot-history");
           const traces = plot && plot.data || [];
           const found = traces.filter(t => (t.name || "").startsWith("Infeasible"));
           return found.length ? found.flatMap(t => [...t.x]) : null;""",
    )
    assert breached(study) and set(numbers) == set(breached(study))


def test_the_note_has_the_block_below_the_persons_text(driver: Any, address: str) -> None:
    driver.get(f"{address}/note")
    text = wait_for(
        driver,
        "return document.body.innerText.includes('Ledger') ? document.body.innerText : null;",
    )
    assert text.index(PERSON) < text.index("Resource usage") < text.index("Ledger")
    assert "Terminated, rejected and failed trials" in text
    assert "optuna_quota:" not in text and "[//]" not in text
    assert driver.execute_script("return window.hacked === undefined;")
    assert len(driver.find_elements("css selector", "table")) >= 2


def test_a_terminated_trial_shows_its_reason_and_image(
    driver: Any, address: str, study: optuna.Study
) -> None:
    number = breached(study)[0]
    driver.get(f"{address}/trials?numbers={number}")
    width = wait_for(
        driver,
        """const img = document.querySelector('img[src^="/artifacts/"]');
           return img && img.complete ? img.naturalWidth : null;""",
    )
    text = driver.execute_script("return document.body.innerText;")
    assert width >= 600
    assert "Terminated. Memory limit exceeded" in text and "300 MiB allowed" in text


def test_usage_is_a_column_that_sorts_as_numbers(
    driver: Any, address: str, study: optuna.Study
) -> None:
    driver.get(f"{address}/smartSelection")
    script = """const heads = [...document.querySelectorAll("th")];
        const at = heads.findIndex(h => h.innerText.includes("quota:memory"));
        if (at < 0) return null;
        window.head = heads[at];
        const rows = [...document.querySelectorAll("tbody tr")];
        return rows.map(r => r.children[at].innerText).filter(t => t.length);"""
    wait_for(driver, script)
    expected = sorted(t.user_attrs[f"{PREFIX}memory"] for t in study.trials)
    click = "(head.querySelector('.MuiTableSortLabel-root') || head.firstElementChild).click();"
    seen: set[bool] = set()
    for _ in range(2):
        driver.execute_script(click)
        seen.add(sorted_so(driver, script, expected, seen))
    assert seen == {True, False}


def sorted_so(driver: Any, script: str, expected: list[float], seen: set[bool]) -> bool:
    """Wait until a column stands in an order not seen yet; return whether it ascends."""
    from selenium.webdriver.support.ui import WebDriverWait

    orders = {True: expected, False: expected[::-1]}

    def found(driver: Any) -> tuple[bool] | None:
        column = [float(text) for text in driver.execute_script(script)]
        left = (up for up in orders if up not in seen and column == orders[up])
        return next(((up,) for up in left), None)

    ascending: tuple[bool] = WebDriverWait(driver, 30, poll_frequency=0.1).until(found)
    return ascending[0]


def test_the_trial_table_has_no_column_of_forty_lines(driver: Any, address: str) -> None:
    driver.get(f"{address}/smartSelection")
    heads = wait_for(
        driver,
        """const heads = [...document.querySelectorAll("th")].map(h => h.innerText);
           return heads.some(h => h.includes("quota:memory")) ? heads : null;""",
    )
    assert not any("timeline" in head for head in heads)
