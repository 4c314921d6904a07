"""Many workers, killed at random, on a storage that restarts: does the quota hold?

Worker processes run one study through `QuotaSampler` while one of them after another is killed
with SIGKILL and replaced, and the database server, a PostgreSQL of this run's own, is restarted
in the middle. Then a reader that knows nothing but Optuna and the documented attributes sums the
rows and compares.

    python benchmarks/soak.py --seconds 30
    python benchmarks/soak.py --storage journal-file --seconds 10
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
import json
import multiprocessing
from multiprocessing.process import BaseProcess
import os
from pathlib import Path
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from weakref import WeakSet

import optuna


sys.path.insert(0, str(Path(__file__).parents[1]))

from optuna_quota import check, Quota, QuotaSampler, status
from optuna_quota._ledger.state import LedgerState
from tests.storages import Address, SHARED, storage_at


OWN = "own-postgresql"
# Seconds of one trial, at most; and how long the last trials may take to stop.
TRIAL = 0.1
# Seconds after which a journal's lock is taken from a worker that was killed with it. Each kill
# may be one of those, and by Optuna's own default of 30 s nobody would do anything else.
LOCK_GRACE = 5
# Seconds that a loaded machine is forgiven before a run counts as stuck.
WAIT_TIME = 120.0
READER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import optuna
optuna.logging.set_verbosity(optuna.logging.CRITICAL)
from tests.storages import Address
study = optuna.load_study(study_name=sys.argv[5], storage=Address(*sys.argv[2:5]).open())
trials = study.get_trials()
names = ["n_trials", "trial_time", "open", "without_reason", "completed", "granted"]
found = dict.fromkeys([*names, "dead", "charged", "late", "overrun", "latest"], 0)
for trial in trials:
    held = trial.system_attrs.get("quota:reservation", {})
    found["open"] += not trial.state.is_finished()
    found["completed"] += trial.state.name == "COMPLETE"
    known = trial.state.name == "COMPLETE" or trial.user_attrs.get("quota:reason")
    found["without_reason"] += not known
    if trial.user_attrs.get("quota:outcome") == "rejected" or "began" not in held:
        continue
    found["n_trials"] += 1
    granted = held["granted"]["trial_time"]
    charged = held.get("charged", {}).get("trial_time")
    measured = trial.user_attrs.get("quota:wall_time")
    amounts = [amount for amount in (measured, charged) if amount is not None]
    used = max(amounts) if amounts else granted
    found["trial_time"] += used
    found["granted"] += min(used, granted)
    if charged is not None:
        found["dead"] += 1
        found["charged"] += used
    if used > granted:
        found["late"] += 1
        found["overrun"] += used - granted
        found["latest"] = max(found["latest"], used - granted)
print(json.dumps(found))
"""


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -1, 1)
    until = time.monotonic() + TRIAL * random.random()
    while time.monotonic() < until:
        time.sleep(0.005)
        check(trial)
    return x**2


def work(address: Address, name: str, quota: Quota) -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    sampler = QuotaSampler(optuna.samplers.RandomSampler(), quota=quota, lease=20)
    try:
        study = optuna.load_study(study_name=name, storage=address.open(), sampler=sampler)
        study.optimize(objective)
    except optuna.exceptions.StorageInternalError:
        # A transaction was cut in two: Optuna can't know whether it happened.
        sys.exit(7)


@dataclass
class Tally:
    """What happened to the workers."""

    killed: int = 0
    faults: int = 0
    restarts: int = 0


class Server:
    """A PostgreSQL server of this run's own, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        shutil.chown(folder, "postgres") if os.getuid() == 0 else None
        folder.chmod(0o755)
        self._run("initdb", "-A", "trust", "-U", "soak", "--no-sync")
        self._control("start")

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"postgresql+psycopg2://soak@127.0.0.1:{self.port}/postgres"

    def restart(self) -> None:
        """Cut all connections and start again."""
        self._control("restart", "-m", "fast")

    def stop(self) -> None:
        """End the server."""
        self._control("stop", "-m", "immediate")

    def _control(self, action: str, *more: str) -> None:
        options = f"-p {self.port} -k {self._data} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-w", "-l", str(self._data / "log"), "-o", options, *more, action)

    def _run(self, program: str, *arguments: str) -> None:
        command = [_find(program), "-D", str(self._data), *arguments]
        if os.getuid() == 0:
            # PostgreSQL refuses to run as root.
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=WAIT_TIME)


def _find(program: str) -> str:
    found = shutil.which(program) or next(
        (str(p) for p in Path("/usr/lib/postgresql").glob(f"*/bin/{program}")), None
    )
    if found is None:
        raise SystemExit(f"{program} is not installed; try --storage journal-file.")
    return found


@contextmanager
def place(kind: str, folder: Path) -> Iterator[tuple[Address, Server | None]]:
    """Yield a storage, and the server where it is of this run's own."""
    if kind != OWN:
        with storage_at(kind, folder) as address:
            yield replace(address, lock_grace=LOCK_GRACE), None
        return
    server = Server(folder)
    try:
        yield Address("postgresql", server.url), server
    finally:
        server.stop()


def soak(
    address: Address, name: str, quota: Quota, server: Server | None, options: argparse.Namespace
) -> Tally:
    """Keep workers running, killing one after another, until the quota ends them all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optuna", "optuna_quota"])

    def hire() -> BaseProcess:
        process = context.Process(target=work, args=(address, name, quota), daemon=True)
        process.start()
        return process

    tally, next_kill = Tally(), 0.0
    workers = [hire() for _ in range(options.workers)]
    try:
        wait_for_a_row(address, name)
        began = time.monotonic()
        while workers and time.monotonic() - began < wait_time(options.seconds, tally):
            time.sleep(0.05)
            passed = time.monotonic() - began
            for process in [p for p in workers if p.exitcode is not None]:
                workers.remove(process)
                if process.exitcode != 0:
                    tally.faults += process.exitcode > 0
                    workers.append(hire())
            if server is not None and not tally.restarts and passed > options.seconds / 2:
                server.restart()
                tally.restarts += 1
            if workers and passed > next_kill and passed < options.seconds:
                next_kill = passed + options.kill_every * random.uniform(0.5, 1.5)
                victim = random.choice(workers)
                victim.kill()
                tally.killed += 1
    finally:
        for process in workers:
            process.kill()
            process.join()
    return tally


def wait_for_a_row(address: Address, name: str) -> None:
    """Wait until the first worker has begun: to kill those that have not shows nothing."""
    study = optuna.load_study(study_name=name, storage=address.open())
    deadline = time.monotonic() + WAIT_TIME
    while not study.get_trials(deepcopy=False) and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_time(seconds: float, tally: Tally) -> float:
    """Return how many seconds a run may take: each kill may hold everybody up for a lock."""
    return 5 * seconds + tally.killed * LOCK_GRACE + WAIT_TIME


def fail_orphaned_trials(address: Address, name: str, quota: Quota) -> None:
    """Let a last worker fail what the killed ones left; untouched rows take ten leases."""
    study = optuna.load_study(study_name=name, storage=address.open())
    state = LedgerState(study, quota, time, lease=0.2, studies=WeakSet((study,)))
    deadline = time.monotonic() + LOCK_GRACE + WAIT_TIME
    while state.refresh().open and time.monotonic() < deadline:
        time.sleep(0.1)


def read_apart(address: Address, name: str) -> dict[str, float]:
    """Return the sums of a reader that shares no code with the ledger."""
    root = str(Path(__file__).parents[1])
    arguments = [root, address.kind, address.place, address.prefix, name]
    command = [sys.executable, "-W", "ignore", "-c", READER, *arguments]
    found: dict[str, float] = json.loads(subprocess.check_output(command, timeout=WAIT_TIME))
    return found


def report(address: Address, name: str, quota: Quota, tally: Tally) -> bool:
    """Print what was found; return whether all is well."""
    table = status(optuna.load_study(study_name=name, storage=address.open()), quota=quota).table
    apart = read_apart(address, name)
    print(
        f"killed {tally.killed}, ended by a storage fault {tally.faults}, "
        f"restarts of the database {tally.restarts}, completed {apart['completed']:.0f}"
    )
    print(f"{'':12} {'quota':>10} {'ledger':>10} {'rows':>10}")
    for resource in ("n_trials", "trial_time"):
        ledger = table.loc[resource, "used"]
        figures = f"{ledger:>10.3f} {apart[resource]:>10.3f}"
        print(f"{resource:12} {getattr(quota, resource):>10} {figures}")
    print(
        f"of the trial time, {apart['charged']:.3f} s are upper bounds charged for "
        f"{apart['dead']:.0f} trials of the dead;\n{apart['late']:.0f} trials were stopped late, "
        f"by {apart['overrun']:.3f} s in all and {apart['latest']:.3f} s at worst"
    )
    # What is granted never adds up to more than the quota, and a trial is stopped at what it was
    # granted: all that a total can come to beyond its quota is how late the stops were.
    within = (quota.trial_time or 0.0) + 1e-6 * (1 + apart["n_trials"])
    checks = {
        "trial time within the quota, but for late stops": apart["granted"] <= within,
        "no trial too many": apart["n_trials"] <= (quota.n_trials or 0),
        "every row finished": apart["open"] == 0,
        "every row that did not complete has a reason": apart["without_reason"] == 0,
        "ledger = sum of the rows": all(
            abs(table.loc[r, "used"] - apart[r]) < 1e-6 for r in ("n_trials", "trial_time")
        ),
    }
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", choices=[OWN, *SHARED], default=OWN)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long workers are killed")
    parser.add_argument("--kill-every", type=float, default=1.0, help="seconds, on average")
    parser.add_argument("--n-trials", type=int, default=400)
    parser.add_argument("--trial-time", type=float, help="seconds; 0.1 a trial by default")
    parser.add_argument("--quick", action="store_true", help="4 workers, 4 s, in a file")
    options = parser.parse_args()
    if options.quick:
        options.storage, options.workers, options.seconds = "journal-file", 4, 4.0
        options.n_trials, options.kill_every = 60, 0.5
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    seconds = options.trial_time or options.n_trials * TRIAL
    quota = Quota(n_trials=options.n_trials, trial_time=seconds)
    with tempfile.TemporaryDirectory() as folder, place(options.storage, Path(folder)) as found:
        address, server = found
        name = optuna.create_study(storage=address.open(), study_name="soak").study_name
        tally = soak(address, name, quota, server, options)
        fail_orphaned_trials(address, name, quota)
        if not report(address, name, quota, tally):
            sys.exit(1)


if __name__ == "__main__":
    main()
