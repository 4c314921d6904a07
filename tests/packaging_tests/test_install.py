"""The wheel and the sdist, in clean environments, with the oldest releases and the newest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.parser import Parser
from importlib.util import find_spec
import os
from pathlib import Path
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from optuna_quota import __version__


ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: object, **options: object) -> str:
    # The libraries are installed without bytecode: their first use has to leave it.
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    # Isolated, an environment is made for the sdist and one for the wheel.
    options = ["--no-isolation"] if find_spec("hatchling") else []
    run(sys.executable, "-m", "build", *options, "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def oldest(wheel: Path, extra: str) -> Iterator[str]:
    """Yield each requirement at the lower bound that the wheel claims."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        bound = re.fullmatch(r"\s*([\w.-]+)>=([\w.]+)\s*", requirement)
        if bound and (not marker or f"'{extra}'" in marker):
            yield f"{bound[1]}=={bound[2]}"


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"optuna_quota-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"optuna_quota", f"optuna_quota-{__version__}.dist-info"}
    assert "optuna_quota/py.typed" in names
    sources = (ROOT / "optuna_quota").rglob("*")
    wanted = {p.relative_to(ROOT).as_posix() for p in sources if p.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert wanted <= set(names)


def test_both_can_be_uploaded(built: Path) -> None:
    pytest.importorskip("twine")
    found = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert found.count("PASSED") == 2


def test_the_sdist_holds_what_the_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"):
        assert name in names
    assert not any(name.endswith((".pyc", ".db")) for name in names)


def install(wheel: Path, folder: Path, *requirements: str) -> Path:
    # To install pip takes seconds: this process's own does for each environment.
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "-q", "--no-compile", wheel, *requirements)
    return folder / "bin"


def try_out(programs: Path, folder: Path) -> str:
    """Run a study and the commands on it; return the storage's URL."""
    url = f"sqlite:///{folder}/smoke.db"
    run(programs / "python", SMOKE, url, cwd=folder)
    program = programs / "optuna-quota"
    assert run(program, "--version") == f"optuna-quota {__version__}\n"
    assert "completed" in run(program, "status", "--storage", url)
    assert "3 trials finished" in run(program, "report", "--storage", url)
    assert '"findings"' in run(program, "doctor", "--format", "json")
    return url


@pytest.fixture(scope="module")
def environments(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The programs of two environments, which are made at the same time."""
    folder = tmp_path_factory.mktemp("environments")
    requirements = {"newest": [], "oldest": list(oldest(wheel, "dashboard"))}
    if HAS_NO_OLDEST:
        del requirements["oldest"]
    with ThreadPoolExecutor() as executor:
        made = {
            name: executor.submit(install, wheel, folder / name, *wanted)
            for name, wanted in requirements.items()
        }
    return {name: future.result() for name, future in made.items()}


HAS_NO_OLDEST = sys.version_info >= (3, 13)


@pytest.mark.skipif(
    HAS_NO_OLDEST, reason="the oldest supported NumPy has no wheel for this Python"
)
def test_it_works_with_the_oldest_releases(environments: dict[str, Path], tmp_path: Path) -> None:
    programs = environments["oldest"]
    url = try_out(programs, tmp_path)
    page = tmp_path / "report.html"
    run(programs / "optuna-quota", "report", "--storage", url, "--html", page, "--publish")
    assert "<html" in page.read_text(encoding="utf-8")


def test_it_works_with_the_newest_releases(environments: dict[str, Path], tmp_path: Path) -> None:
    try_out(environments["newest"], tmp_path)
