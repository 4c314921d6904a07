r"""Show what a quota and limits would have done to a study that has run (exit status 3: the quota
would have ended it early).

optuna-quota replay --storage sqlite:///tuning.db --limit memory=2GiB --limit wall_time=5min
optuna-quota replay --storage tuning.log --study-name first --quota cost=10 --price cpu_time=0.05

# would the best trial have completed?
optuna-quota replay --storage sqlite:///tuning.db --limit memory=2GiB --format json \
    | jq .best_lives
"""

from __future__ import annotations

import argparse

from optuna_quota.cli import common


KEYS = {
    "quota": "the replayed quota by resource, null without one",
    "limits": "the replayed limits by resource, null without any",
    "ended_at": "seconds into the study at which the quota would have ended it, or null",
    "ended_by": "the resource that would have been used up, or null",
    "saved": "what would have been saved, by resource",
    "terminated": "numbers of the trials that would have been terminated",
    "not_run": "numbers of the trials that would not have run",
    "lost": "numbers of the completed trials that would have been lost",
    "best": "number of the best trial, or those of the Pareto front",
    "best_lives": "whether it would have completed",
    "best_left": "the best of those that would have completed",
    "notes": "what could not be replayed",
    "trials": "a list: number, outcome, fate, by, scope, seconds, saved_…, lost",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_study_arguments(parser)
    common.add_quota_arguments(
        parser, "a ceiling on the whole study, may be repeated", limits=True
    )


def run(options: argparse.Namespace) -> int:
    from optuna_quota._analysis.replay import replay

    quota, limits = common.parse_quota(options), common.parse_limits(options)
    if not quota and not limits:
        raise common.UsageError("give at least one --quota or --limit to replay.")
    with common.progress("replaying the trials"):
        report = replay(common.load_study(options), quota=quota or None, limits=limits or None)
        summary = report.summary()
    if options.format == "json":
        quota_used = report.quota and report.quota.amounts()
        limits_used = report.limits and report.limits.amounts()
        trials = common.records(report.table)
        common.write_json(
            common.as_json(report, KEYS, quota=quota_used, limits=limits_used, trials=trials)
        )
    else:
        common.write_line(summary)
    return common.OK if report.ended_by is None else common.OVER_QUOTA
