"""Output, log records and warnings of trials appear in the study's process."""

from __future__ import annotations

import collections
import enum
import importlib
import logging
import os
from pathlib import Path
import sys
from typing import Any
import warnings

import numpy as np
import optuna
import pytest

from optuna_quota import isolated
from optuna_quota._isolation import output
from optuna_quota._isolation.output import portable
from tests.isolation_tests.scripts import METHODS, run_python, run_script


optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_output_arrives_as_if_printed_by_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("to out", trial.number)  # noqa: T201
        print("to err", file=sys.stderr)  # noqa: T201
        sys.stdout.write("no newline")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    captured = capsys.readouterr()
    assert captured.out == "to out 0\nno newline"
    assert captured.err == "to err\n"


def test_output_of_children_goes_to_the_descriptors(capfd: pytest.CaptureFixture[str]) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("from the trial", flush=True)  # noqa: T201
        os.system("echo from a shell")
        return 0.0

    optuna.create_study().optimize(isolated(objective), n_trials=1)
    # They arrive separately, as `sys.stdout` is not the descriptor under pytest.
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["from a shell", "from the trial"]


def test_a_study_whose_streams_are_closed(tmp_path: Path) -> None:
    script = """
import sys, optuna
from optuna_quota import isolated
sys.stdin.close(), sys.stdout.close()
study = optuna.create_study()
study.optimize(isolated(lambda trial: 1.0), n_trials=1)
open("value.txt", "w").write(str(study.best_value))
"""
    run_python(tmp_path, "-c", script)
    assert (tmp_path / "value.txt").read_text() == "1.0"


def test_a_closed_stream_is_not_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objective(trial: optuna.Trial) -> float:
        print("lost")  # noqa: T201
        trial.set_user_attr("none", sys.stdout is None)
        return float(os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev)

    study = optuna.create_study()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "__stdout__", None)
    study.optimize(isolated(objective), n_trials=1)
    assert study.best_value == 1.0
    assert study.best_trial.user_attrs["none"]


def test_records_reach_the_handlers_of_the_study(caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> float:
        logger = logging.getLogger("mine.model")
        logger.debug("not asked for")
        logger.info("step %d", 3)
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("caught")
        return 0.0

    with caplog.at_level(logging.INFO, logger="mine"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    assert [r.getMessage() for r in caplog.records if r.name == "mine.model"] == [
        "step 3",
        "caught",
    ]
    assert "ValueError: inner" in caplog.text


def test_records_keep_plain_fields_and_messages(caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> float:
        logging.getLogger("mine").info(
            {"loss": 0.5}, extra={"metrics": {"loss": [1, np.float32(2)]}}
        )
        logging.getLogger("mine").info("%(n)d", {"n": 3}, extra={"owner": (object, 1)})
        return 0.0

    with caplog.at_level(logging.INFO, logger="mine"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    first, second = (record for record in caplog.records if record.name == "mine")
    assert first.msg == {"loss": 0.5} and vars(first)["metrics"] == {"loss": [1, np.float32(2)]}
    assert second.getMessage() == "3" and vars(second)["owner"] == ("<class 'object'>", 1)


def test_warnings_are_shown_and_filtered_as_in_the_study() -> None:
    def objective(trial: optuna.Trial) -> float:
        warnings.warn("take care", UserWarning, stacklevel=1)
        return 0.0

    with pytest.warns(UserWarning, match="take care"):
        optuna.create_study().optimize(isolated(objective), n_trials=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="take care"):
            optuna.create_study().optimize(isolated(objective), n_trials=1)


@pytest.mark.parametrize("action, times", [("default", 1), ("always", 3)])
def test_a_warning_of_each_trial_is_shown_as_in_one_process(action: Any, times: int) -> None:
    def objective(trial: optuna.Trial) -> float:
        warnings.warn("again", UserWarning, stacklevel=1)
        return 0.0

    for run in (isolated(objective), objective):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(action, UserWarning)
            optuna.create_study().optimize(run, n_trials=3)
        assert sum(str(warning.message) == "again" for warning in shown) == times, run


def test_loggers_without_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_to_reset", None)
    plain, handled = logging.getLogger("a_plain_one"), logging.getLogger("a_handled_one")
    handled.addHandler(logging.NullHandler())
    try:
        output.prepare_logging(reset=False)
        assert output._to_reset is not None
        assert handled in output._to_reset and plain not in output._to_reset
    finally:
        handled.handlers.clear()


LOGGING = """
import importlib
import logging
import sys
import optuna
from optuna_quota import isolated
import own_module

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.lastResort = logging.StreamHandler(sys.stdout)

def find_logger(name):
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(own_module.handler("function"))
    return logger

find_logger("known")

def objective(trial):
    own_module.logger.warning("one")
    find_logger("known").warning("two")
    find_logger("unknown").warning("three")
    logging.getLogger("unheard").warning("four")
    return 0.0

optuna.create_study().optimize(isolated(objective), n_trials=1)
"""


LOGGING_MODULE = """
import importlib
import logging
import sys

def handler(name):
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    return handler

logger = logging.getLogger("own")
logger.addHandler(handler("module"))
"""


@pytest.mark.slow
def test_handlers_that_trials_set_up_again_do_not_repeat_records(tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text(LOGGING_MODULE)
    lines = run_python(tmp_path, "-c", LOGGING).splitlines()
    assert sorted(lines) == ["four", "function: three", "function: two", "module: one"]


FILTERING = """
import sys
import types
from typing import Any
import warnings
import optuna
from optuna_quota import isolated

optuna.logging.set_verbosity(optuna.logging.WARNING)
made = types.ModuleType("made")
made.Gone = type("Gone", (UserWarning,), {"__module__": "made"})
sys.modules["made"] = made

class Mine(UserWarning):
    pass

def local():
    class Local(UserWarning):
        pass
    return Local

def objective(trial):
    warnings.warn("take care", Mine)
    return 1.0

study = optuna.create_study()
# No trial can find these two; nothing comes of that.
warnings.simplefilter("ignore", local())
warnings.simplefilter("ignore", made.Gone)
warnings.simplefilter("ignore", Mine)
study.optimize(isolated(objective), n_trials=1)
warnings.simplefilter("error", Mine)
study.optimize(isolated(objective), n_trials=1, catch=Mine)
print([t.state.name for t in study.trials])
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "-c"])
def test_filters_for_warning_classes_of_the_script(tmp_path: Path, way: str) -> None:
    (tmp_path / "script.py").write_text(FILTERING)
    arguments = ["script.py"] if way == "file" else ["-c", FILTERING]
    assert run_python(tmp_path, *arguments) == "['COMPLETE', 'FAIL']\n"
    assert "take care" not in (tmp_path / "errors.txt").read_text().partition("[W ")[0]


LATE = """
import importlib, warnings
import optuna
from optuna_quota import isolated

class Late:
    def __reduce__(self):
        return importlib.import_module, ("late",)

late = Late()

def objective(trial):
    assert late.__name__ == "late"
    warnings.warn("take care")
    return 1.0

warnings.simplefilter("error")
study = optuna.create_study()
study.optimize(isolated(objective), n_trials=1)
print([t.state.name for t in study.trials])
"""


@pytest.mark.slow
def test_filters_of_a_module_that_only_the_trial_imports_hold(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import warnings\nwarnings.filterwarnings('ignore', message='take care')\n"
    )
    (tmp_path / "script.py").write_text(LATE)
    assert run_python(tmp_path, "script.py") == "['COMPLETE']\n"


def test_no_module_is_imported_for_its_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "costly"
    package.mkdir()
    (package / "kinds.py").write_text("class Costly(UserWarning): ...\n")
    (package / "__init__.py").write_text(
        "import warnings\n"
        "from costly.kinds import Costly\n"
        "warnings.simplefilter('error', Costly)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def objective(trial: optuna.Trial) -> float:
        assert "costly" not in sys.modules
        kind: Any = importlib.import_module("costly").Costly
        warnings.warn("take care", kind, stacklevel=1)
        return 1.0

    study = optuna.create_study()
    with warnings.catch_warnings():
        kind: Any = importlib.import_module("costly").Costly
        # The study's own filter comes before the one that the package sets when it is imported.
        warnings.simplefilter("ignore", kind)
        study.optimize(isolated(objective), n_trials=1)
    assert study.trials[0].value == 1.0


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
