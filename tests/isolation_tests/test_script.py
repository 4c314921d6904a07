"""Scripts as objectives: their values, their pruning, their limits, their failures."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import signal
import sys
from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import TrialState
import pytest

from optuna_quota import (
    Limits,
    preemptible,
    Quota,
    QuotaPruner,
    QuotaSampler,
    script,
    TrialCrashed,
)
from optuna_quota._isolation.isolated import fill_command, split_command
from optuna_quota._records import read_record
from tests.isolation_tests.trials import MIB, needs_supervisor


optuna.logging.set_verbosity(optuna.logging.WARNING)

TRAIN = """\
for step in 0 1 2; do
    echo "{\\"step\\": $step, \\"value\\": $1}"
done
echo "it is written as is: é"
echo "a warning" >&2
printf '{"value": %s}' "$1"
"""


def shell(source: str, *words: str) -> list[str]:
    return ["sh", "-c", source, "train.sh", *words]


def suggest_x(trial: optuna.Trial) -> dict[str, Any]:
    return {"x": trial.suggest_float("x", 0, 1)}


def run_one(
    command: Any, limits: Limits | None = None, base: BasePruner | None = None, **options: Any
) -> optuna.trial.FrozenTrial:
    pruner = base if limits is None else QuotaPruner(base, limits=limits)
    study = optuna.create_study(pruner=pruner)
    study.optimize(script(command, lambda trial: {}, **options), n_trials=1)
    return study.trials[0]


class AtStep(BasePruner):
    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.last_step is not None and trial.last_step >= self.step


@pytest.mark.parametrize("pruner", [None, NopPruner(), QuotaPruner(limits=Limits(memory="1GiB"))])
def test_values_and_output(pruner: BasePruner | None, capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(pruner=pruner)
    study.optimize(script(shell(TRAIN, "{x:.3f}"), suggest_x), n_trials=2)
    for trial in study.trials:
        x = round(trial.params["x"], 3)
        assert trial.state == TrialState.COMPLETE
        assert trial.value == x
        assert trial.intermediate_values == {0: x, 1: x, 2: x}
        record = read_record(trial)
        assert (record.outcome, record.isolation) == ("completed", "process")
        assert record.usage.wall_time and record.usage.memory
    printed = capsys.readouterr()
    assert "[trial 1] it is written as is: é\n" in printed.out
    assert f'[trial 1] {{"value": {study.trials[1].value:.3f}}}\n' in printed.out
    assert "[trial 0] a warning\n" in printed.err


def test_several_at_once_with_a_quota() -> None:
    study = optuna.create_study(
        sampler=QuotaSampler(quota=Quota(n_trials=4, cpu_time="1min")),
        pruner=QuotaPruner(MedianPruner(), limits=Limits(memory="1GiB", wall_time="1min")),
    )
    study.optimize(script(shell(TRAIN, "{x}"), suggest_x), n_trials=9, n_jobs=2)
    # The thread that is done first may ask once more, and be refused.
    refused = [t for t in study.trials if read_record(t).outcome == "rejected"]
    ran = [t for t in study.trials if t not in refused]
    assert [t.value for t in ran] == [t.params["x"] for t in ran]
    assert len(ran) == 4 and len(refused) < 2


def test_several_objectives() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    source = """echo '{"step": 0, "value": 1}'; echo '{"values": [1, 2]}'"""
    study.optimize(script(shell(source), lambda trial: {}), n_trials=1)
    assert study.trials[0].values == [1, 2]


def test_folder_and_environment(tmp_path: Path) -> None:
    source = """[ "$(pwd -P)" = "$1" ] && echo "{\\"value\\": $NUMBER}" """
    folder = str(tmp_path.resolve())
    assert run_one(shell(source, folder), cwd=tmp_path, env={"NUMBER": "3"}).value == 3


def test_values_of_python_arrive_as_they_are_printed(tmp_path: Path) -> None:
    """Otherwise a script could be pruned only at its end."""
    source = 'import time; print(\'{"step": 0, "value": 1}\'); time.sleep(60)'
    trial = run_one([sys.executable, "-c", source], base=AtStep(0))
    assert trial.state == TrialState.PRUNED


# Stops.

ENDLESS = "while :; do sleep 0.02; done"


@pytest.mark.parametrize("limits", [None, Limits(memory="1GiB")])
def test_a_pruned_script_may_save_its_work(limits: Limits | None, tmp_path: Path) -> None:
    source = f"""\
trap 'echo saved > {tmp_path}/saved; exit 3' TERM
for step in 0 1 2; do echo "{{\\"step\\": $step, \\"value\\": 1}}"; done
{ENDLESS}"""
    trial = run_one(shell(source), limits, AtStep(2), grace_period=60)
    assert trial.state == TrialState.PRUNED
    assert set(trial.intermediate_values) == {0, 1, 2}
    assert read_record(trial).outcome == "pruned" or limits is None
    assert (tmp_path / "saved").exists()


@needs_supervisor
def test_the_polite_stop_reaches_what_the_script_started(tmp_path: Path) -> None:
    """The shell in between ends at once, and its child takes a while to save its work."""
    inner = f"""\
trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit' TERM
echo '{{"step": 0, "value": 1}}'
{ENDLESS}"""
    trial = run_one(shell('sh -c "$1"; true', inner), base=AtStep(0), grace_period=60)
    assert trial.state == TrialState.PRUNED
    assert (tmp_path / "saved").exists()


@needs_supervisor
def test_a_script_that_ignores_the_polite_stop_is_killed_with_its_children(tmp_path: Path) -> None:
    inner = f"""\
trap '' TERM
echo $$ > {tmp_path}/pid
echo '{{"step": 0, "value": 1}}'
{ENDLESS}"""
    trial = run_one(shell('setsid sh -c "$1"; true', inner), base=AtStep(0), grace_period=0.3)
    assert trial.state == TrialState.PRUNED
    pid = (tmp_path / "pid").read_text().strip()
    assert inner.encode() not in read_command(pid)


def read_command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_script_over_a_limit_may_save_its_work(tmp_path: Path) -> None:
    source = f"trap 'echo saved > {tmp_path}/saved; exit' TERM; while :; do :; done"
    trial = run_one(shell(source), Limits(cpu_time=0.5), grace_period=60)
    record = read_record(trial)
    assert (trial.state, record.outcome) == (TrialState.PRUNED, "terminated")
    assert record.breach is not None and record.breach.resource == "cpu_time"
    assert (tmp_path / "saved").exists()


@needs_supervisor
def test_memory_of_a_child_of_the_script_counts() -> None:
    source = "import time; x = b'x' * (300 << 20); time.sleep(60)"
    command = shell('"$@"; echo done', sys.executable, "-c", source)
    trial = run_one(command, Limits(memory="150MiB"))
    record = read_record(trial)
    assert record.breach is not None and record.breach.resource == "memory"
    assert record.breach.observed > 150 * MIB


def test_interrupts_reach_the_script(tmp_path: Path) -> None:
    class Interrupting(BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            raise KeyboardInterrupt

    source = f"""\
trap 'echo saved > {tmp_path}/saved; exit' INT
echo '{{"step": 0, "value": 1}}'
{ENDLESS}"""
    with pytest.raises(KeyboardInterrupt):
        run_one(shell(source), base=Interrupting(), grace_period=60)
    assert (tmp_path / "saved").exists()


def test_a_preempted_script_may_save_its_work_and_runs_again(tmp_path: Path) -> None:
    class Preempting(BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            os.kill(os.getpid(), signal.SIGUSR1)
            return False

    source = f"""\
trap 'echo saved > {tmp_path}/saved; exit' TERM
echo '{{"step": 0, "value": 1}}'
{ENDLESS}"""
    study = optuna.create_study(pruner=Preempting())
    with preemptible(study, signals=[signal.SIGUSR1]):
        study.optimize(script(shell(source), suggest_x, grace_period=60), n_trials=3)
    first, again = study.trials
    assert (first.state, read_record(first).outcome) == (TrialState.FAIL, "preempted")
    assert again.state == TrialState.WAITING
    assert (tmp_path / "saved").exists()


# Failures.


def reason_of(command: Any) -> str:
    trial = run_one(command)
    assert trial.state == TrialState.FAIL
    record = read_record(trial)
    assert record.outcome == "failed" and record.reason is not None
    return record.reason


def test_the_reason_of_a_failure() -> None:
    numbers = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo error $i >&2; done"
    reason = reason_of(shell(f"""echo '{{"value": 1}}'; {numbers}; exit 3"""))
    assert reason.startswith("The script ended with exit status 3. The end of its standard error:")
    assert reason.endswith("\n".join(f"error {i}" for i in range(3, 13)))
    assert reason_of(shell("kill -USR1 $$")) == "The script was killed by SIGUSR1."
    assert reason_of(shell("""echo '{"step": 1, "value": 1}'""")).startswith(
        "The script printed no value."
    )


def test_a_script_that_can_not_be_started() -> None:
    study = optuna.create_study()
    study.optimize(script("./{name}", lambda trial: {"name": "nothing-here"}), n_trials=1)
    reason = read_record(study.trials[0]).reason
    assert reason is not None and reason.startswith("The script could not be started: ")


def test_scripts_that_all_fail_end_the_study() -> None:
    study = optuna.create_study()
    with pytest.raises(TrialCrashed, match="The first 3 trials .* exit status 1") as caught:
        study.optimize(script("false", lambda trial: {}), n_trials=9)
    assert caught.value.exitcode == 1
    assert len(study.trials) == 3
    with pytest.raises(TrialCrashed, match="exit status 1"):
        optuna.create_study().optimize(script("false", lambda t: {}, on_crash="raise"), n_trials=9)


def test_a_value_that_is_none_fails_the_trial_as_usual() -> None:
    assert run_one(shell("""echo '{"value": NaN}'""")).state == TrialState.FAIL


@needs_supervisor
def test_a_process_that_stays_behind_is_not_waited_for() -> None:
    trial = run_one(shell("""sleep 60 & echo '{"value": 1}'"""))
    assert trial.value == 1


def test_much_output(capsys: pytest.CaptureFixture[str]) -> None:
    source = """\
import sys
sys.stdout.buffer.write(b"x" * 5_000_000 + b"\\n" + b"\\xff\\0y\\n" * 50_000)
print('{"value": 1}')"""
    assert run_one([sys.executable, "-c", source]).value == 1
    printed = capsys.readouterr().out
    assert printed.count("x") == 5_000_000 and printed.count("y\n") == 50_000


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: script("", suggest_x), ValueError, "must begin with a program"),
        (lambda: script("for x in 1", suggest_x), FileNotFoundError, "not on the PATH. No shell"),
        (lambda: script("./no-such.sh", suggest_x), FileNotFoundError, "does not exist"),
        (lambda: script(["/etc/passwd"], suggest_x), PermissionError, "not executable"),
        (lambda: script("true", {"x": 1}), TypeError, "`params` must be a function"),
        (lambda: script("true", suggest_x, cwd="/nowhere"), FileNotFoundError, "`cwd` must be"),
        (lambda: script("true", suggest_x, cwd=1), TypeError, "`cwd` must be"),
        (lambda: script("true", suggest_x, env={"X": 1}), TypeError, "`env` must map"),
        (lambda: script("true", suggest_x, env={1: "X"}), TypeError, "`env` must map"),
        (lambda: script("true", suggest_x, env="X=1"), TypeError, "`env` must map"),
        (lambda: script("true", suggest_x, grace_period=-1), ValueError, "`grace_period` must"),
        (lambda: script("true", suggest_x, on_crash="no"), ValueError, "`on_crash` must"),
    ],
)
def test_mistakes_are_found_at_once(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        (suggest_x, ValueError, "has {y} but `params` returned 'x'"),
        (lambda trial: None, TypeError, "`params` must return a dict but returned None"),
    ],
)
def test_mistakes_of_params_end_the_study(params: Any, error: type[Exception], text: str) -> None:
    study = optuna.create_study()
    with pytest.raises(error, match=text):
        study.optimize(script("true {y}", params), n_trials=3)
    assert len(study.trials) == 1


# Commands: split as a shell does, filled with a trial's parameters, or a clear error.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --lr {lr}", ["train", "--lr", "0.5"]),
        (["train", "--lr={lr}"], ["train", "--lr=0.5"]),
        ([Path("train.sh"), "{text}"], ["train.sh", "a b'c"]),
        ("train '{text}' x{text}y", ["train", "a b'c", "xa b'cy"]),
        ("train 'two words' {n:03d} {lr:.2e}", ["train", "two words", "007", "5.00e-01"]),
        ("train {model.width}", ["train", "64"]),
        ("train {{lr}} ${lr} {} {1}", ["train", "{lr}", "${lr}", "{}", "{1}"]),
        (["sh", "-c", """echo '{"value": 1}' {n}"""], ["sh", "-c", """echo '{"value": 1}' 7"""]),
    ],
)
def test_words(command: Any, words: list[str]) -> None:
    values = {"lr": 0.5, "text": "a b'c", "n": 7, "model.width": 64}
    assert fill_command(split_command(command), values) == words


def test_the_program_is_checked_unless_it_depends_on_the_parameters() -> None:
    with pytest.raises(FileNotFoundError, match="'no-such-program'"):
        script("no-such-program {x}", lambda trial: {})
    assert repr(script("./{model} {x}", lambda trial: {})) == """script("'./{model}' '{x}'")"""


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        ("", ValueError, "must begin with a program"),
        ([], ValueError, "must begin with a program"),
        (["", "x"], ValueError, "must begin with a program"),
        ("train 'x", ValueError, "No closing quotation"),
        (b"train", TypeError, "must be a string or a sequence of strings"),
        (["train", 3], TypeError, "must be a string or a sequence of strings"),
        (None, TypeError, "must be a string or a sequence of strings"),
    ],
)
def test_invalid_commands(command: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        split_command(command)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train {lrr}", r"has {lrr} but `params` returned 'lr'. Write {{lrr}} where"),
        ("train {lr:d}", "{lr:d} can't format 0.5: Unknown format code 'd'"),
    ],
)
def test_a_parameter_that_can_not_be_filled_in(command: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        fill_command(split_command(command), {"lr": 0.5})
    assert text in str(caught.value)
