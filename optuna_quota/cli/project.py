"""``optuna-quota project``: will it fit? No study is run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota._resources import format_amount
from optuna_quota._resources import get_resource
from optuna_quota._resources import Strategy
from optuna_quota.cli.arguments import add_command
from optuna_quota.cli.arguments import add_limit_argument
from optuna_quota.cli.arguments import add_price_argument
from optuna_quota.cli.arguments import add_quota_argument
from optuna_quota.cli.arguments import OK
from optuna_quota.cli.arguments import OVER_QUOTA
from optuna_quota.cli.arguments import read_count
from optuna_quota.cli.arguments import read_limits
from optuna_quota.cli.arguments import read_quota
from optuna_quota.cli.arguments import UsageError
from optuna_quota.cli.output import styled
from optuna_quota.cli.output import table
from optuna_quota.cli.output import write_json
from optuna_quota.cli.output import write_line
from optuna_quota.cli.storages import add_study_arguments
from optuna_quota.cli.storages import learn_footprint
from optuna_quota.cli.storages import load_study
from optuna_quota.cli.storages import read_footprint


if TYPE_CHECKING:
    from optuna_quota._projection import ProjectedResource
    from optuna_quota._projection import Projection


_EXAMPLES = """\
# what each trial costs is known
optuna-quota project --n-trials 200 --n-jobs 2 --footprint memory=2GiB,wall_time=90s \\
    --quota wall_time=2h --quota memory=8GiB

# it is learned from an earlier study
optuna-quota project --n-trials 500 --storage sqlite:///tuning.db --study-name first \\
    --quota cost=40 --price cpu_time=0.05

# in a CI job: exit status 3 unless it fits
optuna-quota project --n-trials 50 --storage tuning.log --quota wall_time=30min \\
    --format json > projection.json
"""
_KEYS = {
    "fits": "whether every quota holds with the confidence asked for",
    "probability": "that every quota holds",
    "confidence": "what was asked for",
    "strategy": "n_trials and n_jobs as asked for",
    "nearest": "n_trials and n_jobs that would fit, null when it fits or nothing would",
    "quota": "the quota by resource",
    "limits": "the limits by resource",
    "resources": "a list: resource, used, lower, median, upper, quota, probability",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = add_command(
        commands,
        "project",
        "Tell whether a study would fit its quota, before it runs (exit status 3: it would not).",
        examples=_EXAMPLES,
        keys=_KEYS,
    )
    parser.add_argument(
        "--n-trials", metavar="N", type=read_count, required=True, help="trials to run"
    )
    parser.add_argument(
        "--n-jobs", metavar="N", type=read_count, default=1, help="how many at once (default: 1)"
    )
    parser.add_argument(
        "--footprint",
        metavar="NAME=VALUE,…|FILE",
        help="what every trial uses, such as memory=2GiB,wall_time=90s, or a file that "
        "`report --footprint` wrote; without it, it is learned from the study that --storage and "
        "--study-name name",
    )
    add_study_arguments(parser)
    add_quota_argument(parser, "a ceiling on the whole study, may be repeated: ")
    add_price_argument(parser)
    add_limit_argument(parser)
    parser.add_argument(
        "--confidence",
        metavar="P",
        type=float,
        default=0.95,
        help="the probability that is enough (default: 0.95)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Project the strategy and print the verdict."""
    from optuna_quota._projection import project

    if not 0.5 < options.confidence < 1:
        raise UsageError("--confidence must be above 0.5 and below 1.")
    quota, limits = read_quota(options.quota, options.price), read_limits(options.limit)
    projection = project(
        Strategy(options.n_trials, n_jobs=options.n_jobs),
        _footprint(options),
        quota=quota,
        limits=limits,
        confidence=options.confidence,
    )
    if options.format == "json":
        ceilings = {"quota": quota.amounts(), "limits": limits.amounts()}
        write_json({**as_json(projection), **ceilings})
    else:
        for line in lines(projection):
            write_line(line)
    return OK if projection.fits else OVER_QUOTA


def _footprint(options: argparse.Namespace) -> Any:
    if options.footprint is not None:
        return read_footprint(options.footprint)
    return learn_footprint(load_study(options), options.confidence)


def as_json(projection: Projection) -> dict[str, Any]:
    """Return a projection by its documented keys, in SI base units."""
    return {
        "fits": projection.fits,
        "probability": projection.probability,
        "confidence": projection.confidence,
        "strategy": _strategy_as_json(projection.strategy),
        "nearest": projection.nearest and _strategy_as_json(projection.nearest),
        "resources": [vars(resource) for resource in projection.resources],
    }


def _strategy_as_json(strategy: Strategy) -> dict[str, int]:
    return {"n_trials": strategy.n_trials, "n_jobs": strategy.n_jobs}


def lines(projection: Projection) -> Iterator[str]:
    """Return a projection for a terminal."""
    from optuna_quota._projection import describe_difference
    from optuna_quota._projection import describe_strategy
    from optuna_quota._projection import format_probability

    verdict = styled("Fits", "green") if projection.fits else styled("Does not fit", "red")
    yield (
        f"{verdict}: {describe_strategy(projection.strategy).rstrip(',')}; probability "
        f"{format_probability(projection.probability)}, "
        f"{format_probability(projection.confidence)} asked for."
    )
    yield ""
    header = ("resource", "at least", "median", "at most", "quota", "probability")
    yield from table(header, [_row(resource) for resource in projection.resources])
    unknown = [row for row in projection.resources if row.quota and row.probability is None]
    if unknown:
        yield ""
        titles = ", ".join(get_resource(row.resource).title for row in unknown)
        yield f"Nothing is known of {titles}: whether they fit is not judged."
    if projection.nearest is not None:
        yield ""
        difference = describe_difference(projection.nearest, projection.strategy)
        yield f"Nearest that would fit: {difference}."
    elif not projection.fits:
        yield ""
        yield "No smaller strategy would fit."


def _row(resource: ProjectedResource) -> tuple[str, ...]:
    from optuna_quota._projection import format_probability

    def amount(value: float | None) -> str:
        # NaN is what nothing is known of.
        return "" if value is None or value != value else format_amount(resource.resource, value)

    interval = (resource.lower, resource.median, resource.upper)
    probability = resource.probability
    return (
        get_resource(resource.resource).title,
        *map(amount, interval),
        amount(resource.quota),
        "" if probability is None else format_probability(probability),
    )
