r"""Project whether a study fits its quota, before it runs (exit status 3: it does not).

# a known footprint
optuna-quota project --n-trials 200 --n-jobs 2 --footprint memory=2GiB,wall_time=90s \
    --quota wall_time=2h --quota memory=8GiB

# learned from an earlier study
optuna-quota project --n-trials 500 --storage sqlite:///tuning.db --study-name first \
    --quota cost=40 --price cpu_time=0.05

# in a CI job: exit status 3 unless it fits
optuna-quota project --n-trials 50 --storage tuning.log --quota wall_time=30min \
    --format json > projection.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from optuna_quota._limits import Strategy
from optuna_quota._resources import get_resource
from optuna_quota.cli import common


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._projection.projection import Projection


KEYS = {
    "fits": "whether every quota holds with the required confidence",
    "probability": "the probability that every quota holds",
    "confidence": "the required probability",
    "strategy": "the projected n_trials and n_jobs",
    "nearest": "n_trials and n_jobs that would fit, null when it fits or nothing would",
    "quota": "the quota by resource",
    "limits": "the limits by resource",
    "resources": "a list: resource, used, lower, median, upper, quota, probability",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_size_arguments(parser, "trials to run", required=True)
    parser.add_argument(
        "--footprint",
        metavar="NAME=VALUE,…|FILE",
        help="what every trial uses, such as memory=2GiB,wall_time=90s, or a file written by "
        "`report --footprint`; by default it is learned from the study that --storage and "
        "--study-name name",
    )
    common.add_study_arguments(parser)
    common.add_quota_arguments(
        parser, "a ceiling on the whole study, may be repeated", limits=True
    )
    parser.add_argument(
        "--confidence",
        metavar="P",
        type=float,
        default=0.95,
        help="the required probability that every quota holds (default: 0.95)",
    )


def run(options: argparse.Namespace) -> int:
    from optuna_quota._projection.simulation import project

    if not 0.5 < options.confidence < 1:
        raise common.UsageError(
            f"--confidence must be above 0.5 and below 1 but got {options.confidence:g}."
        )
    quota, limits = common.parse_quota(options), common.parse_limits(options)
    if options.footprint is not None:
        footprint = common.parse_footprint(options.footprint)
    else:
        footprint = learn_footprint(common.load_study(options), options.confidence)
    projection = project(
        Strategy(options.n_trials, n_jobs=options.n_jobs),
        footprint,
        quota=quota,
        limits=limits,
        confidence=options.confidence,
    )
    if options.format == "json":
        ceilings = {"quota": quota.amounts(), "limits": limits.amounts()}
        common.write_json({**as_json(projection), **ceilings})
    else:
        for line in _lines(projection):
            common.write_line(line)
    return common.OK if projection.fits else common.OVER_QUOTA


def learn_footprint(study: Study, confidence: float = 0.95) -> Footprint:
    """Return the footprint that a study's trials show, a UsageError if none recorded its usage."""
    from optuna_quota._footprint.footprint import Footprint
    from optuna_quota._footprint.observations import read_observation

    found = [read_observation(trial) for trial in study.get_trials(deepcopy=False)]
    rows = [row for row in found if row is not None]
    if not rows:
        raise common.UsageError(
            f"No trial of the study {study.study_name!r} recorded its usage; state it with "
            "`optuna-quota project --footprint`."
        )
    return Footprint.fit(rows, confidence=confidence)


def as_json(projection: Projection) -> dict[str, Any]:
    """Return a projection by its documented keys, in SI base units."""

    def size(strategy: Strategy) -> dict[str, int]:
        return {"n_trials": strategy.n_trials, "n_jobs": strategy.n_jobs}

    return {
        "fits": projection.fits,
        "probability": projection.probability,
        "confidence": projection.confidence,
        "strategy": size(projection.strategy),
        "nearest": projection.nearest and size(projection.nearest),
        "resources": [vars(resource) for resource in projection.resources],
    }


def _lines(projection: Projection) -> Iterator[str]:
    from optuna_quota._projection.projection import (
        COLUMNS,
        describe_nearest,
        describe_probability,
        describe_resource,
        describe_strategy,
        format_probability,
    )

    text = projection.verdict("Fits", "Does not fit")
    verdict = common.styled(text, "green" if projection.fits else "red")
    yield (
        f"{verdict}: {describe_strategy(projection.strategy)}; probability "
        f"{describe_probability(projection)}, "
        f"{format_probability(projection.confidence)} required."
    )
    yield ""
    yield from common.table(COLUMNS, [describe_resource(row) for row in projection.resources])
    if projection.not_judged:
        titles = ", ".join(get_resource(row.resource).title for row in projection.not_judged)
        yield f"\nUnknown usage, not judged: {titles}."
    if not projection.fits:
        yield f"\n{describe_nearest(projection)}"
