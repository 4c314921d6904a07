"""What a script has set up of libraries that log holds in trials."""

from __future__ import annotations

import collections
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optuna_quota._isolation.log_libraries import portable
from tests.isolation_tests.scripts import METHODS, run_script


LOGURU = """
from loguru import logger

logger.remove()
logger.level("SAVE", no=33)
logger.configure(extra={"run": "r1"})
logger.add("study.log", format="{level} {function} {line} {file} {extra} {message}", level="INFO")
log = logger.bind(part="train")

def objective(trial):
    logger.debug("not asked for")
    log.log("SAVE", "saved {}", trial.number)
    with logger.contextualize(trial=trial.number):
        logger.info("in {}", "context")
    logger.log(25, "by number")
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("caught")
    logger.add(f"trial {trial.number}.log", format="{message}")
    logger.warning("own")
    return 1.0

say(found=values(objective, n_trials=1, methods=[sys.argv[1]]))
"""


@pytest.mark.integration
@pytest.mark.parametrize("method", METHODS)
def test_records_of_loguru_reach_the_handlers_of_the_study(tmp_path: Path, method: str) -> None:
    pytest.importorskip("loguru")
    assert run_script(tmp_path, LOGURU, "script.py", method)["found"] == {method: [1.0]}
    text = (tmp_path / "study.log").read_text()
    first = LOGURU.splitlines().index('    log.log("SAVE", "saved {}", trial.number)') + 2
    # The first line of the script imports the helpers.
    assert text.splitlines()[:4] == [
        f"SAVE objective {first} script.py {{'run': 'r1', 'part': 'train'}} saved 0",
        f"INFO objective {first + 2} script.py {{'run': 'r1', 'trial': 0}} in context",
        f"Level 25 objective {first + 3} script.py {{'run': 'r1'}} by number",
        f"ERROR objective {first + 7} script.py {{'run': 'r1'}} caught",
    ]
    assert "ValueError: inner" in text and text.splitlines()[-1].endswith("{'run': 'r1'} own")
    assert (tmp_path / "trial 0.log").read_text() == "own\n"


STRUCTLOG = """
import logging
import structlog

def add_run(logger, name, event):
    return {**event, "run": "r1"}

handler = logging.FileHandler("study.log")
handler.setFormatter(
    structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(sort_keys=True),
        ]
    )
)
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(logging.INFO)
structlog.configure(
    processors=[add_run, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)

def objective(trial):
    structlog.get_logger("train").info("epoch", loss=0.5, seen=[1, {"a": None}])
    return 1.0

say(found=values(objective, n_trials=1, methods=["forkserver"]))
"""


@pytest.mark.integration
def test_events_of_structlog_are_processed_as_in_the_study(tmp_path: Path) -> None:
    pytest.importorskip("structlog")
    assert run_script(tmp_path, STRUCTLOG)["found"] == {"forkserver": [1.0]}
    assert (tmp_path / "study.log").read_text().splitlines() == [
        '{"event": "epoch", "loss": 0.5, "run": "r1", "seen": [1, {"a": null}]}'
    ]


class Color(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, "text", b"b", np.float32(2), {"a": [1, (2.5, None)]}]
)
def test_plain_values_stay(value: Any) -> None:
    found = portable(value)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Color.RED, "<Color.RED: 'red'>"),
        ({"a": {1}}, {"a": "{1}"}),
        ([object], ["<class 'object'>"]),
        ({(1, object): 2}, {"(1, <class 'object'>)": 2}),
        (collections.Counter("a"), "Counter({'a': 1})"),
    ],
)
def test_others_are_what_they_show(value: Any, shown: Any) -> None:
    assert portable(value) == shown


def test_deep_containers_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "[[...]]" in str(portable(endless))
