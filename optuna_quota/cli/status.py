"""Show what a study has used, reserved and left, by resource, worker and outcome (exit status 3: a
quota is exceeded).

optuna-quota status --storage sqlite:///tuning.db
optuna-quota status --storage postgresql+psycopg2://me@db/tuning --study-name first

# when would 100 more trials end, and is there quota left for them?
optuna-quota status --storage sqlite:///tuning.db --n-trials 100 --n-jobs 4

# in a CI job: exit status 3 when more was used than this
optuna-quota status --storage tuning.log --quota cpu_time=6h --format json
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optuna_quota._limits import Limits, Strategy
from optuna_quota._resources import get_resource, LIMIT_RESOURCES
from optuna_quota.cli import common, project as project_command


if TYPE_CHECKING:
    from optuna_quota._ledger.status import LedgerStatus
    from optuna_quota._projection.projection import Projection


KEYS = {
    "study": "its name",
    "exceeded": "the resources whose quota is exceeded",
    "resources": "a list: resource, used, reserved, left, quota, unknown (trials)",
    "by_worker": "usage of finished trials, by worker and resource",
    "by_outcome": "the same by outcome",
    "running": "number of running trials, by worker",
    "waiting": "how many of these wait for others",
    "end": "when the quota will be used up, a sentence",
    "projection": "with --n-trials: the JSON of `project`",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_study_arguments(parser)
    common.add_quota_arguments(parser, "compare with this instead of the study's own quota")
    common.add_size_arguments(parser, "project this many more trials", required=False)


def run(options: argparse.Namespace) -> int:
    from optuna_quota._ledger.status import status, stored_quota
    from optuna_quota._projection.simulation import project
    from optuna_quota._records import read_amounts, STUDY_LIMITS

    study = common.load_study(options)
    quota = common.parse_quota(options) or stored_quota(study.user_attrs)
    found, projection = status(study, quota=quota), None
    if options.n_trials is not None:
        limits = read_amounts(study.user_attrs.get(STUDY_LIMITS))
        known = {name: limit for name, limit in limits.items() if name in LIMIT_RESOURCES}
        projection = project(
            Strategy(options.n_trials, n_jobs=options.n_jobs),
            project_command.learn_footprint(study),
            quota=quota,
            limits=Limits.from_amounts(known),
            used={line.resource: line.used for line in found.lines},
        )
        found = status(study, quota=quota, projection=projection)
    if options.format == "json":
        resources = [{**vars(line), "left": line.left} for line in found.lines]
        projected = projection and project_command.as_json(projection)
        name = study.study_name
        computed = {"study": name, "resources": resources, "projection": projected}
        common.write_json(common.as_json(found, KEYS, **computed))
    else:
        _write(study.study_name, found, projection)
    fits = projection is None or projection.fits
    return common.OK if fits and not found.exceeded else common.OVER_QUOTA


def _write(name: str, found: LedgerStatus, projection: Projection | None) -> None:
    common.write_line(common.styled(f"Study {name!r}", "bold"))
    common.write_line(f"\n{found}")
    if projection is not None and not projection.fits:
        common.write_line(f"\n{projection}")
    for resource in found.exceeded:
        title = get_resource(resource).title
        common.write_line(common.styled(f"The quota of {title} is exceeded.", "red"))
