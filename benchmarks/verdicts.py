"""A table of verdicts: is a trial that fits left alone, and one that doesn't stopped for memory?

Each objective of ``verdicts_objectives.py`` runs with a memory limit of 1.3 times what it truly
needs, where it must complete, and of 0.7 times, where it must be terminated for memory: five times
each, alone and beside two busy processes. Anything else is a wrong verdict, and one that isn't
there after ``--time-limit`` seconds a hang. The same is asked of pynisher, and of a process of
``multiprocessing`` that is killed once psutil, every 100 ms, finds its tree's resident memory over
the limit.

    python benchmarks/verdicts.py                     # hours; needs: pip install pynisher
    python benchmarks/verdicts.py --quick             # each once, alone
    python benchmarks/verdicts.py --only loky --tools ours,poller --repeats 3
    python benchmarks/verdicts.py --keep FILE         # keeps what was found, and goes on from it

**What an objective truly needs** is the median of three runs without any tool, in a child of
forkserver with the objective's modules loaded. The process of this table, outside of the trial's
tree and of every tool, adds up Pss_Anon, Pss_Shmem and SwapPss of that tree's ``smaps_rollup``
every 10 ms. The peak is the highest level that two samples in a row saw: processes that start,
call exec or end between two reads of a tree are counted twice for an instant. Trials under the
tools are watched in the same way; the last columns are what this library recorded, relative to
that.

The repeats of a limit run one after another in one process, as the trials of one study do; it has
its own session, so a hang ends with it and the rest go on in another. pynisher limits the address
space: it is given the limit and what an empty trial has mapped beyond what it holds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
from dataclasses import asdict, dataclass
import json
import math
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil
from verdicts_objectives import MIB, Objective, OBJECTIVES, Task


RIGHT = {1.3: "completed", 0.7: "terminated"}
LOADS = {"alone": 0, "busy": 2}
PERIOD = 0.01
POLL = 0.1
CALIBRATIONS = 3


# The process of a run: trials one after another, under one tool.


@dataclass(frozen=True)
class Verdict:
    """What a tool said of a trial.

    Attributes:
        kind: "completed", "terminated" (for memory), "failed" or "hung".
        reason: What it said, cut.
        recorded: The peak memory that the tool recorded, in bytes.
    """

    kind: str
    reason: str = ""
    recorded: float | None = None


def drive(specification: str) -> None:
    """Run trials, as the specification says, and write each verdict to its trial's folder."""
    given = json.loads(specification)
    folders = [Path(name) for name in given["folders"]]
    objective = OBJECTIVES[given["objective"]]
    run = TOOLS[given["tool"]](objective, given["limit"])
    for folder in folders:
        # Anew for each: a trial that is killed puts nothing back.
        task = Task(objective.name, objective.prepare(Path(given["shared"])), folder / "pid")
        try:
            verdict = run(task)
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is its verdict
            verdict = Verdict("failed", f"{type(error).__name__}: {error}")
        partial = folder / "verdict.new"
        partial.write_text(json.dumps(asdict(verdict)))
        partial.rename(folder / "verdict")


# Runs one trial under a tool.
Runner = Callable[[Task], Verdict]


def by_ours(objective: Objective, limit: int) -> Runner:
    # Not among the imports above: the other tools' trials are not to hold it.
    import optuna

    from optuna_quota import isolated, Limits

    objective.load()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()

    def run(task: Task) -> Verdict:
        limited = isolated(lambda trial: task(), limits=Limits(memory=limit))
        study.optimize(limited, n_trials=1)
        said = study.trials[-1].user_attrs
        kind, reason = said.get("quota:outcome", "nothing"), said.get("quota:reason", "")
        if kind == "terminated" and said.get("quota:breach", {}).get("resource") != "memory":
            kind = "failed"
        if kind not in RIGHT.values():
            kind, reason = "failed", f"{kind}: {reason}"
        return Verdict(kind, reason, said.get("quota:memory"))

    return run


def by_pynisher(objective: Objective, limit: int) -> Runner:
    import pynisher

    method = _forkserver(objective).get_start_method()
    room = pynisher.limit(_mapped, context=method)()

    def run(task: Task) -> Verdict:
        limited = pynisher.limit(task, memory=limit + room, context=method)
        try:
            return _completed(limited())
        except MemoryError as error:
            return Verdict("terminated", str(error))

    return run


def _mapped() -> int:
    """Return how much address space an empty trial has beyond what it holds."""
    seen = psutil.Process().memory_info()
    return int(seen.vms - (seen.rss - seen.shared))


def by_poller(objective: Objective, limit: int | None) -> Runner:
    """Run tasks in children, each killed over the limit; without one, for calibration."""
    context = _forkserver(objective)

    def run(task: Task) -> Verdict:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, task))
        process.start()
        sender.close()
        try:
            while not receiver.poll(POLL):
                if limit is not None and _resident(process.pid) > limit:
                    return Verdict("terminated", "killed")
            return receiver.recv()
        except EOFError:
            process.join()
            return Verdict("failed", f"exit code {process.exitcode}")
        finally:
            for each in [*_descendants(process.pid), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.join()

    return run


def _resident(pid: int | None) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [psutil.Process(pid), *_descendants(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
    return total


def _descendants(pid: int | None) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _send(connection: Connection, task: Task) -> None:
    try:
        verdict = _completed(task())
    except Exception as error:  # noqa: BLE001 - sent to the other process
        verdict = Verdict("failed", f"{type(error).__name__}: {error}")
    connection.send(verdict)


def _completed(value: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict("failed", f"The value is {value}.")
    return Verdict("completed")


def _forkserver(objective: Objective) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["psutil", "verdicts_objectives", *objective.modules])
    return context


TOOLS: dict[str, Callable[[Objective, Any], Runner]] = {
    "ours": by_ours,
    "poller": by_poller,
    "pynisher": by_pynisher,
}
HEADS = {"ours": "optuna_quota", "poller": "psutil, 100 ms", "pynisher": "pynisher"}


# The process of the table.


class Tree:
    """A process and all that it ever started, also what its parent left behind."""

    def __init__(self, root: int) -> None:
        self._known = {root}

    def memory(self) -> int | None:
        """Return the bytes held, None where processes came or went meanwhile."""
        before = self._living()
        total = sum(_held(pid) for pid in before)
        return total if before and before == self._living() else None

    def _living(self) -> set[int]:
        todo, living = list(self._known), set()
        while todo:
            pid = todo.pop()
            if pid not in living and _is_alive(pid):
                living.add(pid)
                todo += _children(pid)
        self._known = living
        return living


def _is_alive(pid: int) -> bool:
    """Return whether there is such a process, and no zombie."""
    return _read(f"/proc/{pid}/statm").partition(b" ")[0] not in (b"", b"0")


def _children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found = (_read(f"/proc/{pid}/task/{thread}/children").split() for thread in threads)
    return [int(child) for children in found for child in children]


def _held(pid: int) -> int:
    kilobytes = 0
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith((b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")):
            kilobytes += int(line.split()[1])
    return 1024 * kilobytes


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it ended
        return b""


class Observer:
    """Watches the trial whose process has noted its id in a file."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self._tree: Tree | None = None
        self._last = 0
        self.first: int | None = None
        self.peak = 0

    def look(self) -> None:
        """Take one sample."""
        if self._tree is None:
            if not self._note.exists():
                return
            self._tree = Tree(int(self._note.read_text()))
        held = self._tree.memory()
        if held is not None:
            self.first = held if self.first is None else self.first
            self.peak = max(self.peak, min(held, self._last))
            self._last = held


@dataclass(frozen=True)
class Case:
    """One run of the table; ``factor`` is the limit, relative to what the objective needs."""

    objective: str
    tool: str
    load: str
    factor: float
    repeat: int


@dataclass(frozen=True)
class Found:
    """A verdict, and what was seen from outside: bytes at the start, at the peak, and seconds."""

    verdict: Verdict
    first: int
    peak: int
    seconds: float


class Table:
    """Runs cases, and keeps what they gave in a file."""

    def __init__(self, keep: Path | None, shared: Path, time_limit: float) -> None:
        self.found: dict[Case, Found] = {}
        self._keep, self._shared, self._time_limit = keep, shared, time_limit
        if keep is not None and keep.exists():
            for line in keep.read_text().splitlines():
                case, found = json.loads(line)
                verdict = Verdict(**found.pop("verdict"))
                self.found[Case(**case)] = Found(verdict, **found)

    def needs(self, objective: str, repeats: int) -> float:
        """Return the bytes that an objective needs at its peak."""
        cases = [Case(objective, "poller", "alone", math.inf, i) for i in range(repeats)]
        self.run(cases, None)
        peaks = []
        for case in cases:
            found = self.found[case]
            if found.verdict.kind != "completed":
                raise RuntimeError(f"{objective} fails without a limit: {found.verdict.reason}")
            peaks.append(found.peak)
        return statistics.median(peaks)

    def run(self, cases: Sequence[Case], limit: int | None) -> None:
        """Run those cases of one objective, tool and limit that are not found yet."""
        while missing := [case for case in cases if case not in self.found]:
            with busy_processes(LOADS[missing[0].load]) as others:
                self._run(missing, limit, others)

    def _run(self, cases: Sequence[Case], limit: int | None, others: set[int]) -> None:
        """Run cases in one process, as far as it comes."""
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name, str(case.repeat)) for case in cases]
            for folder in folders:
                folder.mkdir()
            specification = {
                "objective": cases[0].objective,
                "tool": cases[0].tool,
                "limit": limit,
                "folders": [str(folder) for folder in folders],
                "shared": str(self._shared),
            }
            with Path(name, "log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--drive", json.dumps(specification)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                for case, folder in zip(cases, folders, strict=True):
                    found = self._watch(process, folder)
                    self._add(case, found)
                    if not (folder / "verdict").exists():
                        break
            finally:
                kill_children(others)
                process.wait()

    def _watch(self, process: subprocess.Popen[bytes], folder: Path) -> Found:
        observer = Observer(folder / "pid")
        start = time.monotonic()
        while (
            not (folder / "verdict").exists()
            and process.poll() is None
            and time.monotonic() - start < self._time_limit
        ):
            observer.look()
            time.sleep(PERIOD)
        seconds = time.monotonic() - start
        verdict = _verdict(folder, process.poll())
        return Found(verdict, observer.first or 0, observer.peak, seconds)

    def _add(self, case: Case, found: Found) -> None:
        self.found[case] = found
        if self._keep is not None:
            with self._keep.open("a") as file:
                file.write(json.dumps([asdict(case), asdict(found)]) + "\n")
        print(
            f"{case.objective}, {case.tool}, {case.factor:g} x, {case.load}: "
            f"{found.verdict.kind}, {found.peak / MIB:.0f} MiB, {found.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )


def _verdict(folder: Path, code: int | None) -> Verdict:
    if (folder / "verdict").exists():
        return Verdict(**json.loads((folder / "verdict").read_text()))
    if code is None:
        return Verdict("hung")
    said = (folder.parent / "log").read_text(errors="replace").strip().splitlines()
    return Verdict("failed", f"exit code {code}: {' '.join(said[-1:])}")


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[set[int]]:
    """Keep cores busy meanwhile; give the ids of who does it."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield {process.pid for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def adopt_orphans() -> None:
    """Make this process the parent of what a run leaves behind."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children(spared: set[int]) -> None:
    """Kill what is left of a run."""
    for process in psutil.Process().children(recursive=True):
        if process.pid not in spared:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(5)


def print_table(table: Table, load: str, tools: Sequence[str], needs: dict[str, float]) -> None:
    beside = f" beside {LOADS[load]} busy processes" if LOADS[load] else ", alone"
    print(f"\nRight verdicts{beside}\n")
    heads = [f"{HEADS[tool]}, {factor:g} x" for tool in tools for factor in RIGHT]
    recorded = ["recorded / true", "worst"] if "ours" in tools else []
    print(f"| {' | '.join(['objective', 'needs, MiB', *heads, *recorded])} |")
    print("| --- |" + " ---: |" * (1 + len(heads) + len(recorded)))
    for name, need in needs.items():
        cells = [name, f"{need / MIB:.0f}"]
        for tool in tools:
            cells += [_cell(_of(table, tool, load, factor, name), factor) for factor in RIGHT]
        if recorded:
            cells += _spread(_ratios(table, load, [name]))
        print(f"| {' | '.join(cells)} |")
    cells = ["all", ""]
    for tool in tools:
        for factor in RIGHT:
            found = [each for name in needs for each in _of(table, tool, load, factor, name)]
            cells.append(_cell(found, factor))
    if recorded:
        cells += _spread(_ratios(table, load, list(needs)))
    print(f"| {' | '.join(cells)} |")


def _of(table: Table, tool: str, load: str, factor: float, name: str) -> list[Found]:
    return [
        found
        for case, found in table.found.items()
        if (case.objective, case.tool, case.load, case.factor) == (name, tool, load, factor)
    ]


def _cell(found: list[Found], factor: float) -> str:
    right = sum(each.verdict.kind == RIGHT[factor] for each in found)
    hung = sum(each.verdict.kind == "hung" for each in found)
    return f"{right}/{len(found)}" + (f", {hung} hung" if hung else "")


def _ratios(table: Table, load: str, names: list[str]) -> list[float]:
    found = [each for name in names for each in _of(table, "ours", load, 1.3, name)]
    return [
        each.verdict.recorded / each.peak
        for each in found
        if each.verdict.kind == "completed" and each.verdict.recorded and each.peak
    ]


def _spread(ratios: list[float]) -> list[str]:
    if not ratios:
        return ["", ""]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    return [f"{statistics.median(ratios):.2f}", f"{worst:.2f}"]


def print_wrong(table: Table, tools: Sequence[str], needs: dict[str, float]) -> None:
    counted: Counter[tuple[str, str, str, str]] = Counter()
    for case, found in table.found.items():
        is_asked = case.objective in needs and case.tool in tools and case.factor in RIGHT
        if is_asked and found.verdict.kind != RIGHT[case.factor]:
            said = " ".join(found.verdict.reason.split())[:140]
            head = f"{case.factor:g} x, {case.load}"
            counted[case.tool, f"{case.objective}, {head}", found.verdict.kind, said] += 1
    for tool in tools:
        print(f"\nWrong verdicts of {HEADS[tool]}\n")
        for (whose, what, kind, said), count in counted.items():
            if whose == tool:
                print(f"- {what}: {kind}, {count} of them. {said}".rstrip())


def is_installed(tool: str) -> bool:
    if tool != "pynisher":
        return True
    try:
        import pynisher  # noqa: F401
    except ImportError:
        print("pynisher is not installed: left out.")
        return False
    return True


def choose(parts: Sequence[str]) -> list[Objective]:
    chosen = []
    for name, objective in OBJECTIVES.items():
        if not parts or any(part.lower() in name.lower() for part in parts):
            missing = objective.missing()
            if missing:
                print(f"{name}: left out, {', '.join(missing)} not installed.")
            else:
                chosen.append(objective)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each once, alone")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of names")
    parser.add_argument("--tools", default="ours,poller,pynisher", help="by default all three")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--busy",
        choices=["no", "yes", "both"],
        default="both",
        help="beside busy processes or not",
    )
    parser.add_argument(
        "--time-limit", type=float, default=180.0, help="seconds until it is a hang"
    )
    parser.add_argument("--keep", type=Path, help="a file of what was found, to go on from")
    parser.add_argument("--needs-only", action="store_true", help="only what the objectives need")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive is not None:
        drive(arguments.drive)
        return
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started ends with it
    tools = [tool for tool in arguments.tools.split(",") if is_installed(tool)]
    loads = {"no": ["alone"], "yes": ["busy"], "both": list(LOADS)}[arguments.busy]
    repeats = arguments.repeats
    if arguments.quick:
        loads, repeats = ["alone"], 1
    start = time.monotonic()
    # Not in memory, where a mapped file would count as shared memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared:
        table = Table(arguments.keep, Path(shared), arguments.time_limit)
        needs: dict[str, float] = {}
        for objective in choose(arguments.only):
            name = objective.name
            needs[name] = table.needs(name, 1 if arguments.quick else CALIBRATIONS)
            if arguments.needs_only:
                continue
            for load in loads:
                for factor in RIGHT:
                    for tool in tools:
                        cases = [Case(name, tool, load, factor, i) for i in range(repeats)]
                        table.run(cases, int(factor * needs[name]))
    if not arguments.needs_only:
        for load in loads:
            print_table(table, load, tools, needs)
        print_wrong(table, tools, needs)
    print(f"\n{(time.monotonic() - start) / 60:.0f} min")


if __name__ == "__main__":
    main()
