"""The whole against its peers: an equal budget of trial time, the same objectives and limits.

Half of each search space is infeasible and the best points lie near the limits. Every tool runs
its trials one at a time in child processes under the same limits on memory and wall time; an
observer of the benchmark's own measures each child's peak every 5 ms, for all tools alike.

    python benchmarks/peers.py                 # needs: pip install smac flaml
    python benchmarks/peers.py --quick         # a smaller budget, one seed

Columns: best loss among trials that kept the limits; trials; breaches; the share of the budget
that went to breaching trials; the largest excursion over the memory limit; and what the tool
itself cost, in seconds beside the trials' own time per trial.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import statistics
import tempfile
import threading
import time
from typing import Any
import warnings

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import psutil
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.gaussian_process.kernels import Matern
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from optuna_quota import isolated
from optuna_quota import Limits
from optuna_quota import Quota
from optuna_quota import QuotaPruner
from optuna_quota import QuotaSampler
from optuna_quota import trial_table


MIB = 2**20
WORST = 1e3


@dataclass(frozen=True)
class Problem:
    """A real objective, its search space, and limits that half of the space breaches."""

    name: str
    function: Callable[[dict[str, Any]], float]
    space: dict[str, BaseDistribution]
    memory: float
    wall_time: float


def forest(params: dict[str, Any]) -> float:
    """Return the log loss of extremely randomised trees on upsampled digits."""
    x, y = load_digits(return_X_y=True)
    x_train, x_valid, y_train, y_valid = train_test_split(x, y, random_state=0)
    copies = params["copies"]
    noise = np.random.default_rng(0).normal(0, 1.0, (copies * len(x_train), x.shape[1]))
    model = ExtraTreesClassifier(
        params["n_estimators"],
        max_depth=params["max_depth"],
        max_features=params["max_features"],
        random_state=0,
    )
    model.fit(np.tile(x_train, (copies, 1)) + noise, np.tile(y_train, copies))
    return float(log_loss(y_valid, model.predict_proba(x_valid)))


def kernel_ridge(params: dict[str, Any]) -> float:
    """Return the error of kernel ridge regression; memory is quadratic in the rows."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (params["rows"] + 500, 4))
    y = np.sin(x).sum(axis=1) + np.abs(x[:, 0] * x[:, 1]) + 0.1 * rng.normal(size=len(x))
    length = params["length"]
    kernel = RBF(length) if params["kernel"] == "rbf" else Matern(length, nu=1.5)
    model = KernelRidge(alpha=params["alpha"], kernel=kernel)
    model.fit(x[500:], y[500:])
    return float(np.mean((model.predict(x[:500]) - y[:500]) ** 2))


PROBLEMS = [
    Problem(
        "forest",
        forest,
        {
            "n_estimators": IntDistribution(20, 600, log=True),
            "max_depth": IntDistribution(2, 30),
            "max_features": FloatDistribution(0.05, 1.0),
            "copies": IntDistribution(1, 6),
        },
        memory=190 * MIB,
        wall_time=1.2,
    ),
    Problem(
        "kernel ridge",
        kernel_ridge,
        {
            "rows": IntDistribution(600, 8000, log=True),
            "alpha": FloatDistribution(1e-4, 1.0, log=True),
            "length": FloatDistribution(0.3, 30.0, log=True),
            "kernel": CategoricalDistribution(["rbf", "matern"]),
        },
        memory=260 * MIB,
        wall_time=4.0,
    ),
]


@dataclass
class Tally:
    """What one tool did with its budget."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    breached: list[bool] = field(default_factory=list)
    excursion: float = 0.0
    elapsed: float = 0.0

    def add(self, loss: float, seconds: float, breached: bool) -> None:
        self.losses.append(WORST if breached else loss)
        self.seconds.append(seconds)
        self.breached.append(breached)

    @property
    def spent(self) -> float:
        return sum(self.seconds)

    @property
    def wasted(self) -> float:
        lost = sum(s for s, b in zip(self.seconds, self.breached, strict=True) if b)
        return lost / self.spent if self.spent else 0.0

    @property
    def cost(self) -> float:
        return (self.elapsed - self.spent) / max(1, len(self.seconds))


class Observer:
    """Measures the peak of each descendant process every 5 ms, whoever started it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.005):
            for child in me.children(recursive=True):
                try:
                    self.peak = max(self.peak, child.memory_info().rss)
                except psutil.Error:
                    continue

    @property
    def excursion(self) -> float:
        return max(0.0, self.peak - self.limit)


def _child(connection: Connection, function: Callable[..., float], params: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    connection.send(function(params))


class Runner:
    """Runs a point in a child for the tools that bring no runner: polls and kills on breach."""

    def __init__(self, problem: Problem, tally: Tally, period: float = 0.1) -> None:
        self.problem, self.tally, self.period = problem, tally, period
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sklearn.ensemble", __name__])

    def __call__(self, params: dict[str, Any]) -> float | None:
        """Return the loss, None on a breach."""
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (sender, self.problem.function, params)
        process = self._context.Process(target=_child, args=arguments)
        start = time.monotonic()
        process.start()
        sender.close()
        try:
            loss = self._wait(process, receiver, start)
        finally:
            process.kill()
            process.join()
        self.tally.add(WORST if loss is None else loss, time.monotonic() - start, loss is None)
        return loss

    def _wait(self, process: Any, receiver: Connection, start: float) -> float | None:
        watched = psutil.Process(process.pid)
        while not receiver.poll(self.period):
            try:
                memory = watched.memory_info().rss
            except psutil.Error:
                return None
            if memory > self.problem.memory or time.monotonic() - start > self.problem.wall_time:
                return None
        loss: float = receiver.recv()
        late = time.monotonic() - start > self.problem.wall_time
        return None if late else loss


def suggest(trial: optuna.Trial, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    """Return a point of a trial asked by hand."""
    return {name: trial._suggest(name, distribution) for name, distribution in space.items()}


def run_tpe(told: str) -> Callable[[Problem, float, int], Tally]:
    """Return a runner of plain TPE that tells breaches as ``told``."""

    def run(problem: Problem, budget: float, seed: int) -> Tally:
        tally = Tally()
        runner = Runner(problem, tally)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        while tally.spent < budget:
            trial = study.ask(problem.space)
            loss = runner(trial.params)
            if loss is not None:
                if told == "constrained":
                    trial.set_constraint("limit", -1.0)
                study.tell(trial, loss)
            elif told == "failed":
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                if told == "constrained":
                    trial.set_constraint("limit", 1.0)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return tally

    return run


def run_ours(problem: Problem, budget: float, seed: int) -> Tally:
    """Run this library: the quota ends the study, the limits end the trials."""
    study = optuna.create_study(
        sampler=QuotaSampler(
            optuna.samplers.TPESampler(seed=seed), quota=Quota(trial_time=budget)
        ),
        pruner=QuotaPruner(
            limits=Limits(memory=problem.memory, wall_time=problem.wall_time),
        ),
    )
    function, space = problem.function, problem.space

    def objective(trial: optuna.Trial) -> float:
        return function(suggest(trial, space))

    study.optimize(isolated(objective), n_trials=10_000)
    tally = Tally()
    table = trial_table(study)
    ran = table[table["wall_time"].notna() & (table["outcome"] != "rejected")]
    for _, row in ran.iterrows():
        value = row["value"] if row["outcome"] == "completed" else WORST
        tally.add(value, row["wall_time"], row["outcome"] != "completed")
    return tally


def address_space(memory: float) -> int:
    """Return the bytes of address space that leave a child as much room as the memory limit.

    SMAC3 hands its limit in bytes to pynisher, which caps the address space of a child that it
    forks: what is mapped there already counts, and much of it is not resident. So a child of the
    same kind is asked.
    """
    import pynisher

    mapped, resident = pynisher.Pynisher(_own_memory)()
    return int(mapped + max(0.0, memory - resident))


def _own_memory() -> tuple[int, int]:
    info = psutil.Process().memory_info()
    return info.vms, info.rss


def run_smac(problem: Problem, budget: float, seed: int) -> Tally:
    """Run SMAC3's hyperparameter facade under its own limits of a trial."""
    from ConfigSpace import Categorical
    from ConfigSpace import ConfigurationSpace
    from ConfigSpace import Float
    from ConfigSpace import Integer
    from smac import Callback
    from smac import HyperparameterOptimizationFacade
    from smac import Scenario
    from smac.runhistory.enumerations import StatusType

    def hyperparameter(name: str, d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return Categorical(name, list(d.choices))
        if isinstance(d, IntDistribution):
            return Integer(name, (d.low, d.high), log=d.log)
        assert isinstance(d, FloatDistribution)
        return Float(name, (d.low, d.high), log=d.log)

    space = ConfigurationSpace(seed=seed)
    space.add([hyperparameter(name, d) for name, d in problem.space.items()])

    def target(config: Any, seed: int = 0) -> float:
        return problem.function(dict(config))

    class Budget(Callback):  # type: ignore[misc]
        """Ends the search by the time of its trials; its own limit counts its models, too."""

        def __init__(self) -> None:
            self.spent = 0.0

        def on_tell_end(self, smbo: Any, info: Any, value: Any) -> bool | None:
            self.spent += value.time
            return False if self.spent >= budget else None

    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            space,
            deterministic=True,
            seed=seed,
            n_trials=10_000,
            crash_cost=WORST,
            trial_walltime_limit=problem.wall_time,
            trial_memory_limit=address_space(problem.memory),
            output_directory=Path(folder),
        )
        facade = HyperparameterOptimizationFacade(
            scenario, target, overwrite=True, logging_level=50, callbacks=[Budget()]
        )
        facade.optimize()
    tally = Tally()
    for value in facade.runhistory.values():
        loss = value.cost if isinstance(value.cost, float) else value.cost[0]
        tally.add(loss, value.time, value.status != StatusType.SUCCESS)
    return tally


def run_flaml(problem: Problem, budget: float, seed: int) -> Tally:
    """Run FLAML's CFO; a breach is told as the worst loss, since it knows no limits."""
    from flaml import tune

    def domain(d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return tune.choice(list(d.choices))
        if isinstance(d, IntDistribution):
            make = tune.lograndint if d.log else tune.randint
            return make(d.low, d.high + 1)
        assert isinstance(d, FloatDistribution)
        return (tune.loguniform if d.log else tune.uniform)(d.low, d.high)

    tally = Tally()
    runner = Runner(problem, tally)

    def evaluate(config: dict[str, Any]) -> dict[str, float]:
        loss = runner(config)
        return {"loss": WORST if loss is None else loss}

    np.random.seed(seed)
    tune.run(
        evaluate,
        config={name: domain(d) for name, d in problem.space.items()},
        metric="loss",
        mode="min",
        time_budget_s=budget,
        num_samples=-1,
        verbose=0,
    )
    return tally


TOOLS: dict[str, Callable[[Problem, float, int], Tally]] = {
    "optuna_quota": run_ours,
    "TPE, breaches failed": run_tpe("failed"),
    "TPE, breaches pruned": run_tpe("pruned"),
    "TPE, breaches constrained": run_tpe("constrained"),
    "SMAC3, trial limits": run_smac,
    "FLAML": run_flaml,
}


def measure(tool: str, problem: Problem, budget: float, seed: int) -> Tally | None:
    """Return what a tool did, None where it isn't installed."""
    with Observer(problem.memory) as observer:
        start = time.monotonic()
        try:
            tally = TOOLS[tool](problem, budget, seed)
        except ModuleNotFoundError as error:
            print(f"  {tool}: not installed ({error.name})")
            return None
        tally.elapsed = time.monotonic() - start
    tally.excursion = observer.excursion
    return tally


def report(problem: Problem, tallies: dict[str, list[Tally]], budget: float) -> None:
    """Print one table, medians over the seeds."""
    print(
        f"\n{problem.name}: {budget:g} s of trial time, memory <= {problem.memory / MIB:.0f} MiB, "
        f"wall time <= {problem.wall_time:g} s"
    )
    print(
        f"{'tool':27}{'best':>9}{'trials':>8}{'breaches':>10}{'wasted':>8}"
        f"{'over by':>10}{'cost/trial':>12}"
    )
    for tool, runs in tallies.items():
        print(
            f"{tool:27}"
            f"{statistics.median(min(t.losses, default=WORST) for t in runs):>9.4f}"
            f"{statistics.median(len(t.losses) for t in runs):>8g}"
            f"{statistics.median(sum(t.breached) for t in runs):>10g}"
            f"{statistics.median(t.wasted for t in runs):>8.0%}"
            f"{max(t.excursion for t in runs) / MIB:>6.0f} MiB"
            f"{statistics.median(t.cost for t in runs) * 1e3:>9.0f} ms"
        )


def main() -> None:
    """Run every tool on every problem, the tools in turn for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of trial time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="20 s and one seed")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS))
    arguments = parser.parse_args()
    budget, seeds = (20.0, 1) if arguments.quick else (arguments.budget, arguments.seeds)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    for problem in PROBLEMS:
        tallies: dict[str, list[Tally]] = {}
        for seed in range(seeds):
            for tool in arguments.tools:
                tally = measure(tool, problem, budget, seed)
                if tally is not None:
                    tallies.setdefault(tool, []).append(tally)
        report(problem, tallies, budget)


if __name__ == "__main__":
    main()
