"""What importing the library costs, beside Optuna's own import.

Each import runs in a new interpreter, the kinds in turn, so that a slow moment of the machine
falls on all of them. The bare interpreter's start is taken off.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
import statistics
import subprocess
import sys
import time


ROOT = Path(__file__).parents[1]
KINDS = {
    "(bare interpreter)": "pass",
    "import optuna": "import optuna",
    "import optuna_quota": "import optuna_quota",
    "… and its Limits, Quota": "from optuna_quota import Limits, Quota",
    "… and its sampler, pruner": "from optuna_quota import QuotaPruner, QuotaSampler",
    "… and analyze": "from optuna_quota import analyze",
    "optuna-quota --help": "from optuna_quota.cli import build_parser; "
    "build_parser().format_help()",
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for code in KINDS.values():
        seconds(code)  # compiles what isn't yet
    for _ in range(3 if arguments.quick else arguments.rounds):
        for kind, code in KINDS.items():
            times[kind].append(seconds(code))
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    bare = medians.pop("(bare interpreter)")
    optuna = medians["import optuna"] - bare
    print(f"bare interpreter: {bare * 1e3:.0f} ms, taken off below\n")
    print(f"{'':<28}{'median':>10}{'of Optuna':>12}")
    for kind, median in medians.items():
        print(f"{kind:<28}{(median - bare) * 1e3:>7.1f} ms{(median - bare) / optuna:>12.2f}")


if __name__ == "__main__":
    main()
