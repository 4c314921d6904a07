"""The whole against its peers: an equal budget of trial time, the same objectives and limits.

Half of each search space is infeasible, and more work mostly means a better model, so the best
points lie towards the limit. Kernel ridge is limited in memory alone, forests in wall time alone.
The limits come from random points that are run first, so they suit the machine. Each study is a
process of its own, and each trial runs in a child of that, one at a time; see ``peers_trials.py``
for what is measured and how, alike for all tools.

    python benchmarks/peers.py                 # needs: pip install smac flaml
    python benchmarks/peers.py --quick         # a third of the budget, one seed
    python benchmarks/peers.py --keep FILE     # keeps studies there, and continues with them

TPE and FLAML run their trials as users do by hand: in forkserver's children, polled every 100 ms
and killed over the limit. SMAC3 enforces its own limits. What our trials inherit counts in part,
so their memory limit is the one that leaves as much room. What SMAC3 and FLAML are given:
the loss of a model that learned nothing for a breach; SMAC3 an initial design of 15 points, a
quarter of the trials expected, the address space that leaves as much room as the memory limit
does, forkserver's small children in place of forks of itself, and an end to the signal handler
with which pynisher's children outlive their time limit by 5 s; FLAML its cheapest point to start.

Columns, medians over the seeds [least, most]: the best loss among trials that kept the limits;
trials; breaches (and those among them that the tool did not notice); the share of the budget that
went to breaching trials; the largest excursion over the memory limit, of all seeds; trial time
spent, of the budget; CPU time of all the tool's processes without their trials, and clock time
beside that of the trials, each per trial.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import contextlib
import ctypes
import itertools
import json
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from peers_trials import MIB, Observer, own_memory, PROBLEMS, send, suggest, Target, Task
import psutil

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler


BUDGET = 60
POINTS = 16
# The processes that tools start would run this file again, were it the program itself.
STUDY = "import json, sys, peers; peers.run_study(*json.loads(sys.argv[1]))"


class Runner:
    """Runs a point in a child, for tools without a runner: polls, and kills on a breach."""

    def __init__(self, task: Task, target: Target, observer: Observer) -> None:
        self.task, self.target, self.observer = task, target, observer
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["peers_trials"])
        first = self._context.Process(target=own_memory)  # starts the server
        first.start()
        first.join()

    def __call__(self, params: dict[str, Any]) -> float | None:
        """Return the loss, None on a breach."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=send, args=(sender, self.target, params))
        start = time.monotonic()
        process.start()
        sender.close()
        loss = self._wait(process.pid, receiver, start)
        process.kill()
        process.join()
        self.observer.tell(loss is None)
        return loss

    def _wait(self, pid: int | None, receiver: Connection, start: float) -> float | None:
        ready = False
        while not ready and time.monotonic() - start < (self.task.wall_time or np.inf):
            ready = receiver.poll(0.1)
            # One that is gone has sent what it had to.
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = psutil.Process(pid).memory_info().rss
                if not ready and memory > (self.task.memory or np.inf):
                    return None
        late = time.monotonic() - start > (self.task.wall_time or np.inf)
        return None if late or not ready else float(receiver.recv())


def calibrate(task: Task, target: Target, observer: Observer, seed: int) -> None:
    """Run random points; a limit on wall time is far enough off not to move the median."""
    runner = Runner(task, target, observer)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(POINTS):
        runner(study.ask(PROBLEMS[task.problem].space).params)


def run_ours(task: Task, target: Target, observer: Observer, seed: int) -> None:
    space = PROBLEMS[task.problem].space

    def objective(trial: optuna.Trial) -> float:
        return target({name: suggest(trial, name, each) for name, each in space.items()})

    def stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        observer.tell(trial.state != TrialState.COMPLETE)
        if observer.spent() >= task.budget:
            study.stop()

    # All tools' processes are under way before the first trial: here, a trial that loads what the
    # objective does, and one that finds it loaded.
    first = optuna.create_study(sampler=QuotaSampler())
    first.optimize(isolated(lambda trial: float(target.scale)), n_trials=2)
    memory = task.memory
    if task.room is not None:
        # What a trial inherits counts in part only: the limit that leaves it as much room.
        memory = task.room + first.trials[-1].user_attrs["quota:memory"]
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        sampler=QuotaSampler(sampler, quota=Quota(trial_time=4 * task.budget)),
        pruner=QuotaPruner(limits=Limits(memory=memory, wall_time=task.wall_time)),
    )
    study.optimize(isolated(objective), callbacks=[stop])


def run_tpe(told: str) -> Callable[[Task, Target, Observer, int], None]:
    """Return plain TPE that tells breaches as ``told``."""

    def run(task: Task, target: Target, observer: Observer, seed: int) -> None:
        runner = Runner(task, target, observer)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        while observer.spent() < task.budget:
            trial = study.ask(PROBLEMS[task.problem].space)
            loss = runner(trial.params)
            if told == "constrained":
                trial.set_constraint("limit", 1.0 if loss is None else -1.0)
            state = TrialState.FAIL if told == "failed" else TrialState.PRUNED
            study.tell(trial, loss, state=state if loss is None else None)

    return run


def run_smac(task: Task, target: Target, observer: Observer, seed: int) -> None:
    from ConfigSpace import Categorical, ConfigurationSpace, Float, Integer
    import pynisher
    from smac import Callback, HyperparameterOptimizationFacade, Scenario
    from smac.runhistory.enumerations import StatusType

    def parameter(name: str, d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return Categorical(name, list(d.choices))
        make = Integer if isinstance(d, IntDistribution) else Float
        return make(name, (d.low, d.high), log=d.log)

    class Budget(Callback):  # type: ignore[misc]
        def on_tell_end(self, smbo: Any, info: Any, value: Any) -> bool | None:
            observer.tell(value.status != StatusType.SUCCESS)
            return False if observer.spent() >= task.budget else None

    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["peers_trials"])
    mapped = pynisher.Pynisher(own_memory)()[0]
    space, problem = ConfigurationSpace(seed=seed), PROBLEMS[task.problem]
    space.add([parameter(name, each) for name, each in problem.space.items()])
    scenario = Scenario(
        space,
        deterministic=True,
        seed=seed,
        n_trials=10_000,
        crash_cost=problem.worst,
        trial_walltime_limit=task.wall_time,
        trial_memory_limit=None if task.room is None else int(mapped + task.room),
        output_directory=observer.path.parent,
    )
    facade = HyperparameterOptimizationFacade(
        scenario,
        target.mended,
        initial_design=HyperparameterOptimizationFacade.get_initial_design(
            scenario, n_configs=BUDGET // 4
        ),
        overwrite=True,
        logging_level=50,
        callbacks=[Budget()],
    )
    facade.optimize()


def run_flaml(task: Task, target: Target, observer: Observer, seed: int) -> None:
    from flaml import tune

    def domain(d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return tune.choice(list(d.choices))
        if isinstance(d, IntDistribution):
            return (tune.lograndint if d.log else tune.randint)(d.low, d.high + 1)
        return (tune.loguniform if d.log else tune.uniform)(d.low, d.high)

    problem, runner = PROBLEMS[task.problem], Runner(task, target, observer)

    def evaluate(config: dict[str, Any]) -> dict[str, float] | None:
        if observer.spent() >= task.budget:
            return None  # ends the search
        loss = runner(config)
        return {"loss": problem.worst if loss is None else loss}

    np.random.seed(seed)
    tune.run(
        evaluate,
        config={name: domain(each) for name, each in problem.space.items()},
        low_cost_partial_config=problem.cheap,
        metric="loss",
        mode="min",
        time_budget_s=1.5 * task.budget,  # of the clock; the trials' own time ends it before
        num_samples=-1,
        verbose=0,
    )


TOOLS: dict[str, Callable[[Task, Target, Observer, int], None]] = {
    "optuna_quota": run_ours,
    "TPE, breaches failed": run_tpe("failed"),
    "TPE, breaches pruned": run_tpe("pruned"),
    "TPE, breaches constrained": run_tpe("constrained"),
    "SMAC3": run_smac,
    "FLAML": run_flaml,
}


def run_study(tool: str, order: dict[str, Any], seed: int, where: str) -> None:
    """Run one study and store its result in a folder."""
    task, folder = Task(**order), Path(where)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run = TOOLS.get(tool, calibrate)
    with Observer(folder / "log") as observer:
        target = Target(task.problem, task.scale, str(observer.path))
        before, start = time.process_time(), time.monotonic()
        run(task, target, observer, seed)
        elapsed = time.monotonic() - start
    trials = [
        {
            "seconds": trial.seconds(),
            "loss": trial.loss,
            "told": bool(trial.told),
            "kept": trial.kept(task),
            "excess": trial.excess(task),
            "peak": trial.peak,
            "rise": trial.rise,
        }
        for trial in observer.trials
    ]
    other = before + observer.cpu + sum(trial.cpu for trial in observer.trials)
    found = {"trials": trials, "elapsed": elapsed, "other": other}
    (folder / "found").write_text(json.dumps(found))


def study(tool: str, task: Task, seed: int) -> dict[str, Any]:
    """Return what a study in a process of its own did, and the CPU time that the tool took."""
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps([tool, vars(task), seed, folder])
        # A fork server loads modules ahead from nowhere but there.
        paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen([sys.executable, "-c", STUDY, order], env=paths)
        status, usage = os.wait4(process.pid, 0)[1:]
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        while True:  # what outlives it comes to this process, see main()
            try:
                usage = os.wait3(0)[2]
            except ChildProcessError:
                break
            cpu += usage.ru_utime + usage.ru_stime
        if process.returncode:
            raise RuntimeError(f"{tool} ended with status {process.returncode}.")
        found: dict[str, Any] = json.loads((Path(folder) / "found").read_text())
    return {**found, "cpu": cpu - found.pop("other")}


def calibrated(problem: str, budget: float) -> Task:
    """Return a task that half of some random points do not fit into; prints how that came."""
    wall_time, scale = PROBLEMS[problem].wall_time, 1.0
    for _ in range(3):
        task = Task(problem, scale, np.inf, wall_time=wall_time and 3 * wall_time)
        trials = study("calibration", task, 1_000)["trials"]
        seconds = [trial["seconds"] for trial in trials]
        middle = statistics.median(seconds)
        print(f"{problem}, scale {scale:.2f}: {spread(seconds, '.2f')} s at {POINTS} points")
        if wall_time is None or abs(middle / wall_time - 1) < 0.03:
            break
        scale *= wall_time / middle
    if wall_time is not None:
        return Task(problem, scale, budget * wall_time, wall_time=wall_time)
    peaks = [trial["peak"] for trial in trials]
    print(f"{problem}: {spread([peak / MIB for peak in peaks], '.0f')} MiB")
    rest = statistics.median(trial["peak"] - trial["rise"] for trial in trials)
    memory = statistics.median(peaks)
    return Task(problem, scale, budget * middle, memory=memory, room=memory - rest)


def spread(values: Sequence[float], how: str) -> str:
    middle, low, high = (format(f(values), how) for f in (statistics.median, min, max))
    return f"{middle} [{low}, {high}]"


def line(tool: str, task: Task, studies: Sequence[dict[str, Any]]) -> str:
    """Return a tool's line of the table."""
    columns: list[list[float]] = [[] for _ in range(8)]
    unseen = []
    for found in studies:
        trials = found["trials"]
        unnoticed = [each for each in trials if not (each["told"] or each["loss"] is None)]
        losses = [each["loss"] for each in unnoticed if each["kept"]]
        unseen.append(len(unnoticed) - len(losses))
        spent = sum(each["seconds"] for each in trials) or np.nan
        values = (
            min(losses, default=np.inf),
            len(trials),
            len(trials) - len(losses),
            1 - sum(each["seconds"] for each in unnoticed if each["kept"]) / spent,
            max(each["excess"] for each in trials) / MIB,
            spent / task.budget,
            1e3 * found["cpu"] / len(trials),
            1e3 * (found["elapsed"] - spent) / len(trials),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    best, count, breached, wasted, over, spent, cpu, elapsed = columns
    return (
        f"{tool:<26}{spread(best, '.4f'):>26}{statistics.median(count):>8g}"
        f"{statistics.median(breached):>6g} ({statistics.median(unseen):g})"
        f"{spread(wasted, '.0%'):>18}{max(over):>6.0f} MiB{statistics.median(spent):>8.0%}"
        f"{statistics.median(cpu):>8.0f} ms{statistics.median(elapsed):>8.0f} ms"
    )


def main() -> None:
    """Run every tool on every problem, the tools in turn for each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a third of the budget, one seed")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS))
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--keep", type=Path, help="a file to keep studies in and to go on from")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    # What outlives a study is adopted, so that its CPU time is counted, too.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    exists = arguments.keep and arguments.keep.exists()
    kept = dict(map(json.loads, arguments.keep.read_text().splitlines())) if exists else {}

    def remembered(key: Sequence[Any], make: Callable[[], Any]) -> Any:
        name = json.dumps(key)
        if name not in kept:
            kept[name] = make()
            if arguments.keep:
                with arguments.keep.open("a") as file:
                    file.write(json.dumps([name, kept[name]]) + "\n")
        return kept[name]

    budget, seeds = (BUDGET / 3, 1) if arguments.quick else (BUDGET, arguments.seeds)
    for problem in arguments.problems:
        made = remembered([problem, budget], lambda: vars(calibrated(problem, budget)))  # noqa: B023 - used at once
        task, found = Task(**made), dict[str, list[dict[str, Any]]]()
        for seed, tool in itertools.product(range(seeds), arguments.tools):
            one = remembered([problem, budget, tool, seed], lambda: study(tool, task, seed))  # noqa: B023 - used at once
            found.setdefault(tool, []).append(one)
        print(f"\n{problem}: {task}; {seeds} seeds")
        print(f"{'tool':<26}{'best':>26}{'trials':>8}{'breaches':>10}{'wasted':>18}", end="")
        print(f"{'over by':>10}{'spent':>8}{'CPU':>11}{'clock':>11}")
        for tool, studies in found.items():
            print(line(tool, task, studies))
        print()


if __name__ == "__main__":
    main()
