"""What a release says of itself agrees: version, changelog, and the versions of Optuna."""

from __future__ import annotations

from pathlib import Path
import re

from optuna_quota import __version__


ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)$", read(".github/CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == __version__


def test_the_lowest_optuna_is_the_one_that_ci_runs_and_the_readme_names() -> None:
    found = re.search(r'"optuna>=([\d.]+)"', read("pyproject.toml"))
    assert found is not None
    assert f"'=={found[1]}.0'" in read(".ci/run")
    assert f"Optuna {found[1]} or newer" in read("README.md")
