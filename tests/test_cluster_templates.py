"""The guide's templates for clusters: they parse, and the worker runs as in a SLURM job."""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess
import sys
import time

import optuna
import pytest


yaml = pytest.importorskip("yaml")

GUIDE = Path(__file__).parents[1] / ".github" / "GUIDE.md"
TRAIN = """
import os

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.set_user_attr("cores", len(os.sched_getaffinity(0)))
    return x
"""


def template(language: str) -> str:
    text = GUIDE.read_text(encoding="utf-8").split("## Clusters and other tools")[1]
    (found,) = re.findall(rf"```{language}\n(.*?)```", text.split("\n## ")[0], flags=re.DOTALL)
    return str(found)


def test_the_kubernetes_job_gives_a_worker_its_share() -> None:
    job = yaml.safe_load(template("yaml"))
    pod = job["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert pod["restartPolicy"] == "Never"
    names = {"TUNING_STORAGE", "WORKER_CORES", "WORKER_MEMORY_MIB"}
    assert {each["name"] for each in worker["env"]} == names
    assert names <= {*re.findall(r"[A-Z_]{6,}", template("python"))}
    given = {e["name"]: e["valueFrom"].get("resourceFieldRef") for e in worker["env"]}
    assert given["WORKER_CORES"] == {"resource": "limits.cpu"}
    assert given["WORKER_MEMORY_MIB"] == {"resource": "limits.memory", "divisor": "1Mi"}
    mounted = {each["name"] for each in worker["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    grace = re.search(r"grace_period=(\d+)", template("python"))
    assert grace is not None
    assert pod["terminationGracePeriodSeconds"] > int(grace[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a shell and affinity")
def test_the_slurm_array_gives_a_worker_its_share(tmp_path: Path) -> None:
    script = template("sh")
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script, flags=re.MULTILINE)
    assert len(options) == script.count("#SBATCH")
    given = dict(options)
    assert int(given["signal"].partition("@")[2]) > 60
    worker = template("python").replace("n_trials=1000", "n_trials=2")
    files = {"job.sh": script, "worker.py": worker, "train.py": TRAIN}
    # What `srun` starts is what it is given after its options.
    files["srun"] = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
    files["python"] = f'#!/bin/bash\nexec {sys.executable} -W ignore "$@"\n'
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    url = f"sqlite:///{tmp_path}/tuning.db"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TUNING_STORAGE": url,
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 3600),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_MEM_PER_NODE": "2048",
    }
    ended = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "The study ends here" in ended.stderr
    study = optuna.load_study(study_name="tuning", storage=url)
    completed = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(completed) == 2
    assert all(trial.user_attrs["cores"] == 1 for trial in completed)
    assert study.user_attrs["quota:limits"] == {"memory": 2**30, "cpu_cores": 1}
    assert not list((tmp_path / "checkpoints").glob("*/*"))
