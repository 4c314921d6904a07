"""Each module imports only what stands above it in the design."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "optuna_quota"
LAYERS = [
    "_version",
    "exceptions",
    "_units",
    "_resources",
    "_optuna",
    "_storage_retry",
    "_storage_retry",
    "_records",
    "_metering",
    "_enforcement",
    "_isolation",
    "_doctor",
    "_table",
    "_footprint",
    "_utilization",
    "_projection",
    "_ledger",
    "_sampler",
    "_analysis",
    "visualization",
    "dashboard",
    "cli",
    "testing",
]
# `optuna_quota/__init__.py` and `__main__.py` stand below all layers: they name everything.
MODULES = sorted(
    p
    for p in PACKAGE.rglob("*.py")
    if p.relative_to(PACKAGE).as_posix() not in {"__init__.py", "__main__.py"}
)
# Foreign worlds with one door each.
DOORS = {
    "pynvml": {"_metering/nvml.py"},
    "statsmodels": {"_utilization", "_analysis"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, tree: ast.AST, *, typing_too: bool) -> set[str]:
    skipped = set() if typing_too else typing_only(tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def typing_only(tree: ast.AST) -> set[ast.AST]:
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                guarded.update(ast.walk(child))
    return guarded


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_layers_above(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = layer_of(path)
    assert own in LAYERS, f"{own} has no place among the layers"
    for name in imported_modules(path, tree, typing_too=False):
        if name.startswith("optuna_quota."):
            layer = name.split(".")[1]
            if layer in LAYERS:
                assert LAYERS.index(layer) <= LAYERS.index(own), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_foreign_worlds_have_one_door(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    place = path.relative_to(PACKAGE)
    for name in imported_modules(path, tree, typing_too=True):
        for world, doors in DOORS.items():
            if name.split(".")[0] == world:
                assert place.as_posix() in doors or place.parts[0] in doors, f"{place}: {name}"


PRIVATE_OPTUNA_ALLOWED = {"_optuna.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_private_parts_of_optuna_are_touched_in_one_module(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix() in PRIVATE_OPTUNA_ALLOWED:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in imported_modules(path, tree, typing_too=False):
        parts = name.split(".")
        if parts[0] == "optuna":
            assert not any(p.startswith("_") for p in parts), f"{path.name} imports {name}"
    private = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in {"study", "trial", "frozen_trial", "storage"}
        and node.attr.startswith("_")
    }
    assert not private, f"{path.name} touches {private}; add a function to _optuna.py"
