"""The ranks of ``torchrun`` end with the trial of their script."""

from __future__ import annotations

import os
from pathlib import Path
import re
import socket
import sys

import optuna
from optuna.trial import TrialState
import pytest

from optuna_quota import Limits, QuotaPruner, script
from optuna_quota._isolation.linux import can_supervise
from optuna_quota._records import read_record


pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_supervise(), reason="needs Linux with pidfds"),
]

TRAIN = """\
import json, os
import torch.distributed as dist

dist.init_process_group("gloo")
print(f"rank {dist.get_rank()} {os.getpid()} {os.environ['MASTER_PORT']}")
dist.barrier()
if dist.get_rank() == 0:
    print(json.dumps({"step": 0, "value": 1}))
while True:
    dist.barrier()
"""


class AtOnce(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return bool(trial.intermediate_values)


def command_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_both_ranks_end_with_the_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    train = tmp_path / "train.py"
    train.write_text(TRAIN)
    study = optuna.create_study(pruner=QuotaPruner(AtOnce(), limits=Limits(memory="4GiB")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    objective = script(
        [*torchrun, "--nproc-per-node=2", train],
        lambda trial: {},
        env={"OMP_NUM_THREADS": "1"},
        grace_period=60,
    )
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    record = read_record(study.trials[0])
    assert record.outcome == "pruned"
    ranks = re.findall(r"rank (\d) (\d+) (\d+)", capsys.readouterr().out)
    assert {rank for rank, _, _ in ranks} == {"0", "1"}
    for _, pid, port in ranks:
        assert os.fsencode(train) not in command_of(pid)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", int(port)))
