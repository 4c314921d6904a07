"""The packages for OptunaHub are generated, loaded by its own loader, and their example runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
import runpy
import subprocess
import sys

import optuna
import pytest

import optuna_quota


ROOT = Path(__file__).parents[2]
FILES = {"LICENSE", "README.md", "__init__.py", "example.py", "requirements.txt"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    command = [sys.executable, ".ci/optunahub.py", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "package"


@pytest.mark.parametrize(
    ("category", "export"), [("samplers", "QuotaSampler"), ("pruners", "QuotaPruner")]
)
def test_a_package_has_all_its_parts(registry: Path, category: str, export: str) -> None:
    place = registry / category / "quota"
    assert {path.name for path in place.iterdir()} == FILES
    readme = (place / "README.md").read_text(encoding="utf-8")
    _, front, text = readme.split("---\n", 2)
    matter = dict(line.split(": ", 1) for line in front.splitlines())
    assert list(matter) == [
        "author", "title", "description", "tags", "optuna_versions", "license",
    ]  # fmt: skip
    assert category.removesuffix("s") in matter["tags"].strip("[]").split(", ")
    assert matter["optuna_versions"] == f"[{optuna.__version__}]"
    for heading in ("## Abstract", "## APIs", "## Installation", "## Example"):
        assert heading in text
    assert ":class:" not in text and "``" not in text.replace("```", "")
    assert export in (place / "__init__.py").read_text(encoding="utf-8")
    requirement = (place / "requirements.txt").read_text(encoding="utf-8").strip()
    assert requirement == f"optuna-quota>={optuna_quota.__version__}"


def test_the_example_runs_through_optunahub(
    registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optunahub = pytest.importorskip("optunahub")
    load = partial(optunahub.load_local_module, registry_root=str(registry))
    monkeypatch.setattr(optunahub, "load_module", load)
    runpy.run_path(str(registry / "samplers" / "quota" / "example.py"), run_name="__main__")
    assert "30 trials finished" in capsys.readouterr().out
