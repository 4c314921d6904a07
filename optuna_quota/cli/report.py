"""Show which hyperparameters drive resource usage, how certainly, and what to change.

optuna-quota report --storage sqlite:///tuning.db
optuna-quota report --storage sqlite:///tuning.db --html report.html

# publish into optuna-dashboard
optuna-quota report --storage sqlite:///tuning.db --study-name first --publish

# reuse what was learned in the next study's projection
optuna-quota report --storage tuning.log --footprint learned.json
optuna-quota project --n-trials 500 --footprint learned.json --quota wall_time=2h

# what to request from the cluster
optuna-quota report --storage tuning.log --format json | jq '.advice[].snippets'
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TYPE_CHECKING

from optuna_quota.cli import common


if TYPE_CHECKING:
    from optuna.study import Study

    from optuna_quota._report import UtilizationReport


KEYS = {
    "study": "its name",
    "n_trials": "number of finished trials",
    "best": "number of the best trial, or those of the Pareto front",
    "quota": "the study's quota by resource",
    "limits": "its limits by resource",
    "outcomes": "number of trials by outcome",
    "usage": "by resource: n, median, maximum, total",
    "drivers": "by resource, a list: param, share of the variance, factor, change",
    "cheaper_space": "two bounds that halve the cost: resource, bounds, cost, best_kept; or null",
    "front": "trials on the Pareto front of cost and value, a list: number, value, cost; or null",
    "correlations": "a list: param, resource, rho, lower, upper, p_value, p_adjusted, n, …",
    "models": "by resource: formula, kind, coefficients, diagnostics, n_observed, n_censored",
    "missing_models": "why a resource has no model, by resource",
    "advice": "a list: topic, text, figures, snippets",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_study_arguments(parser)
    parser.add_argument("--html", metavar="FILE", help="also write the report as one HTML file")
    parser.add_argument(
        "--publish", action="store_true", help="also write notes and plots into optuna-dashboard"
    )
    parser.add_argument(
        "--footprint",
        metavar="FILE",
        help="write the learned footprint, for `project --footprint` and Footprint.from_json",
    )
    parser.add_argument(
        "--user-attr",
        metavar="NAME",
        action="append",
        default=[],
        help="treat this trial user attribute like a hyperparameter, may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    from optuna_quota._report import analyze
    from optuna_quota.dashboard import publish

    with common.progress("reading the trials") as show:
        study = common.load_study(options)
        _check_user_attrs(options.user_attr, study)
        report = analyze(study, user_attrs=options.user_attr)
        show("fitting models")
        content = _as_json(report) if options.format == "json" else report.summary()
        if options.html is not None:
            show(f"writing {options.html}")
            with _writing("--html", options.html):
                report.to_html(options.html)
        if options.footprint is not None:
            show(f"writing {options.footprint}")
            with _writing("--footprint", options.footprint):
                Path(options.footprint).write_text(report.footprint.to_json(), encoding="utf-8")
    if isinstance(content, str):
        common.write_line(content)
    else:
        common.write_json(content)
    if options.publish:
        # Last, as it fails where optuna-dashboard is missing.
        with common.progress("publishing to optuna-dashboard"):
            publish(study, report)
    return common.OK


@contextmanager
def _writing(option: str, path: str) -> Iterator[None]:
    """Say which file of which option can't be written, and why."""
    try:
        yield
    except OSError as error:
        folder = str(Path(path).parent)
        missing = isinstance(error, FileNotFoundError)
        why = f"there is no folder {folder!r}" if missing else error.strerror or error
        raise OSError(f"{option}: {path!r} can't be written: {why}.") from error


def _check_user_attrs(names: Sequence[str], study: Study) -> None:
    known = {name for trial in study.get_trials(deepcopy=False) for name in trial.user_attrs}
    for name in names:
        if name not in known:
            meant = common.suggestion(name, sorted(known))
            hint = f"; did you mean {meant}?" if meant else "."
            raise common.UsageError(f"--user-attr: no trial has {name!r}{hint}")


def _as_json(report: UtilizationReport) -> dict[str, Any]:
    usage = {}
    for name in report.data.resources:
        known = report.table[name].dropna()
        usage[name] = {
            "n": len(known),
            "median": known.median(),
            "maximum": known.max(),
            "total": known.sum(),
        }
    models = {
        name: common.as_json(
            model,
            ("kind", "formula", "n_observed", "n_censored", "coefficients", "diagnostics"),
            formula=report.formulas[name],
            coefficients=common.records(model.coefficients.rename_axis("term").reset_index()),
            diagnostics=[str(warning) for warning in model.diagnostics],
        )
        for name, model in report.models.items()
    }
    return common.as_json(
        report,
        KEYS,
        study=report.study.study_name,
        n_trials=len(report.table),
        outcomes=report.table["outcome"].value_counts().to_dict(),
        usage=usage,
        drivers={name: [vars(d) for d in each] for name, each in report.drivers.items()},
        cheaper_space=report.cheaper_space and vars(report.cheaper_space),
        front=None if report.front is None else common.records(report.front),
        correlations=common.records(report.correlations),
        models=models,
        advice=[vars(advice) for advice in report.advice],
    )
