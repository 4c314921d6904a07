"""Which versions are installed, and what is lost without the optional ones."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
import platform

from optuna_quota._doctor.finding import Finding
from optuna_quota._doctor.finding import State


REQUIRED = ("optuna-quota", "optuna", "psutil", "nvidia-ml-py", "statsmodels", "cloudpickle")
OPTIONAL = {
    "optuna-dashboard": "`publish` can't put notes and plots into the dashboard.",
    "plotly": "Reports have tables but no figures.",
}


def read_versions() -> dict[str, str | None]:
    """Return the installed version of each distribution, None where there is none."""
    from optuna_quota._version import __version__

    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    # The source tree can be used without being installed.
    versions["optuna-quota"] = versions["optuna-quota"] or __version__
    return versions


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge_versions(versions: Mapping[str, str | None]) -> list[Finding]:
    """Return what is installed.

    Args:
        versions: Version by distribution, None where there is none.
    """
    python = Finding("software", "Python", "ok", f"{platform.python_version()}")
    return [python, *(_judge(name, versions.get(name)) for name in (*REQUIRED, *OPTIONAL))]


def _judge(name: str, version: str | None) -> Finding:
    if version is not None:
        return Finding("software", name, "ok", version)
    state: State = "degraded" if name in OPTIONAL else "missing"
    degrades = OPTIONAL.get(name, "Part of the library won't work.")
    return Finding("software", name, state, "Not installed.", degrades, f"pip install {name}")
