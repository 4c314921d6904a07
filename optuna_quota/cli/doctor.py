"""Show what this host can enforce and measure, what is limited and how to fix it.

optuna-quota doctor
optuna-quota doctor --format json | jq '.findings[] | select(.state != "ok")'
optuna-quota doctor --storage postgresql+psycopg2://me@db/tuning
optuna-quota doctor --strict      # exit status 1 unless all checks are ok
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import platform
import shutil
import textwrap
from typing import TYPE_CHECKING

from optuna_quota.cli import common


if TYPE_CHECKING:
    from optuna_quota._doctor import Finding


KEYS = {
    "host": "its name",
    "platform": "system, release and machine",
    "counts": "number of findings that are ok, degraded, missing",
    "findings": "a list: area, check, state, found, degrades, fix",
}
_TITLES = {
    "stopping": "Stopping a trial",
    "measuring": "Measuring a trial",
    "host": "This host",
    "software": "Software",
    "storage": "Storage",
}
_MARKS = {
    "ok": ("✓", "ok", "green"),
    "degraded": ("!", "!", "yellow"),
    "missing": ("✗", "x", "red"),
}
_LABEL = 23


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", metavar="URL", help="also check this storage")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 unless all checks are ok"
    )


def run(options: argparse.Namespace) -> int:
    from optuna_quota._doctor import examine_host, examine_storage

    findings = examine_host()
    if options.storage:
        findings += examine_storage(common.open_storage(options.storage))
    if options.format == "json":
        computed = {
            "host": platform.node(),
            "platform": platform.platform(),
            "counts": _counts(findings),
            "findings": [vars(finding) for finding in findings],
        }
        common.write_json(computed)
    else:
        for line in lines(findings, min(shutil.get_terminal_size((80, 24)).columns, 100)):
            common.write_line(line)
    healthy = all(finding.state == "ok" for finding in findings)
    return common.FAILED if options.strict and not healthy else common.OK


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    return {state: sum(finding.state == state for finding in findings) for state in _MARKS}


def lines(findings: Sequence[Finding], width: int) -> list[str]:
    """Return the lines that show the findings, at most ``width`` columns wide."""
    out = [
        common.styled(f"{platform.node()}", "bold") + f"  {platform.system()} {platform.release()}"
    ]
    for area, title in _TITLES.items():
        members = [finding for finding in findings if finding.area == area]
        if members:
            out += ["", common.styled(title, "bold")]
            out += [line for finding in members for line in _finding_lines(finding, width)]
    counts = ", ".join(f"{count} {state}" for state, count in _counts(findings).items())
    return [*out, "", f"{counts}."]


def _finding_lines(finding: Finding, width: int) -> list[str]:
    mark, spare, colour = _MARKS[finding.state]
    shown = mark if common.encodes(mark) else spare
    indent = " " * (_LABEL + 4)
    body = textwrap.wrap(finding.found, max(width - len(indent), 30)) or [""]
    first = f"  {common.styled(shown, colour)} {finding.check:<{_LABEL}}{body[0]}"
    rest = [indent + line for line in body[1:]]
    for label, text in (("so:", finding.degrades), ("fix:", finding.fix)):
        if text:
            wrapped = textwrap.wrap(f"{label} {text}", max(width - len(indent), 30))
            rest += [common.styled(indent + line, "dim") for line in wrapped]
    return [first, *rest]
