"""A meter of your own: measure and limit a resource that the library does not know.

A meter has a name, says whether it measures a peak or a running total, and reads one number for
the processes of a trial. Here it is the bytes that the trial has written to its scratch folder;
a count of licences or of open connections would be no different.

Run it with ``python examples/08_a_meter_of_your_own.py``; it takes a few seconds and prints how
much each trial wrote, and which were terminated for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import tempfile
import time

import numpy as np
import optuna

from optuna_quota import isolated, Limits, Quota, QuotaPruner, QuotaSampler, trial_table


class ScratchSpace:
    """Measures the size of all files in a folder, in bytes."""

    name = "scratch"
    peak = True

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def read(self, pids: Sequence[int]) -> float | None:
        """Return the bytes in the folder; None, unknown, when it can't be read."""
        try:
            return float(sum(f.stat().st_size for f in self.folder.iterdir()))
        except OSError:
            return None


def main() -> None:
    """Run a study whose trials may each hold 20 MB of scratch space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:

        def objective(trial: optuna.Trial) -> float:
            parts = trial.suggest_int("parts", 1, 20)
            for part in range(parts):
                np.save(Path(folder) / f"part{part}.npy", np.zeros(250_000))
                time.sleep(0.05)
            for file in Path(folder).iterdir():
                file.unlink()
            return 1 / parts

        study = optuna.create_study(
            sampler=QuotaSampler(optuna.samplers.RandomSampler(seed=0), quota=Quota(n_trials=10)),
            pruner=QuotaPruner(
                limits=Limits(custom={"scratch": 20e6}), meters=[ScratchSpace(folder)]
            ),
        )
        for _ in range(10):
            study.optimize(isolated(objective, grace_period=1.0), n_trials=1)
            for file in Path(folder).iterdir():
                file.unlink()
    table = trial_table(study)
    for row in table.itertuples():
        print(f"trial {row.number}: {row.params_parts:>2} parts, {row.scratch / 1e6:4.0f} MB")
        if row.outcome == "terminated":
            print(f"         {row.reason}")


if __name__ == "__main__":
    main()
