"""Layers: a module imports only from those above it, and there are no import circles."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "optuna_quota"
LAYERS = [
    "_version",
    "exceptions",
    "_units",
    "_html",
    "_resources",
    "_limits",
    "_usage",
    "_optuna",
    "_storage_retry",
    "_records",
    "_metering",
    "_enforcement",
    "_isolation",
    "_doctor",
    "_table",
    "_footprint",
    "footprints",
    "_utilization",
    "_projection",
    "_ledger",
    "_sampler",
    "_analysis",
    "visualization",
    "dashboard",
    "_report",
    "cli",
    "testing",
]
# `optuna_quota/__init__.py` and `__main__.py` stand below all layers: they import everything.
MODULES = sorted(
    p
    for p in PACKAGE.rglob("*.py")
    if p.relative_to(PACKAGE).as_posix() not in {"__init__.py", "__main__.py"}
)
# Packages that are imported in one place.
DOORS = {
    "pynvml": {"_metering/nvml.py"},
    "statsmodels": {"_utilization", "_analysis"},
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> set[str]:
    """Return modules and names that a module imports, for typing too, and by string."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in (
            getattr(node.func, "attr", ""),
            getattr(node.func, "id", ""),
        ):
            names.add(ast.unparse(node.args[0]).strip("f'\""))
    return names


def test_modules_import_only_from_layers_above() -> None:
    upwards = []
    for path in MODULES:
        own, place = layer_of(path), path.relative_to(PACKAGE).as_posix()
        assert own in LAYERS, f"{own} has no place among the layers"
        for name in imported_names(path):
            layer = name.split(".")[1] if name.startswith("optuna_quota.") else own
            lower = layer in LAYERS and LAYERS.index(layer) > LAYERS.index(own)
            # A name that is computed may be any.
            if lower or name.startswith("optuna_quota.{"):
                upwards.append(f"{place} imports {name}")
    assert upwards == []


def circles() -> list[list[str]]:
    """Return groups of modules that import each other, directly or not."""
    paths = {name_of(path): path for path in MODULES}
    direct = {
        name: {n if n in paths else n.rpartition(".")[0] for n in imported_names(path)} - {name}
        for name, path in paths.items()
    }
    reached = {name: names & paths.keys() for name, names in direct.items()}
    grown = True
    while grown:
        grown = False
        for names in reached.values():
            further = set().union(*(reached[name] for name in names)) - names
            names |= further
            grown = grown or bool(further)
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in reached
        if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


def test_no_modules_import_each_other() -> None:
    assert circles() == []


def test_some_packages_are_imported_in_one_place() -> None:
    elsewhere = []
    for path in MODULES:
        place = path.relative_to(PACKAGE)
        for package in {name.split(".")[0] for name in imported_names(path)} & DOORS.keys():
            if not {place.as_posix(), place.parts[0]} & DOORS[package]:
                elsewhere.append(f"{place} imports {package}")
    assert elsewhere == []


# The type of `artifact_store`, which Optuna names in public signatures but does not export.
UNEXPORTED_TYPE = ["optuna", "artifacts", "_protocol"]


def test_private_parts_of_optuna_are_used_in_one_package() -> None:
    private = []
    for path in MODULES:
        if layer_of(path) == "_optuna":
            continue
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "optuna" and parts[:3] != UNEXPORTED_TYPE:
                private += [f"{path.name}: {name}" for part in parts if part.startswith("_")]
        private += [
            f"{path.name}: {ast.unparse(node)}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in {"study", "trial", "frozen_trial", "storage"}
            and node.attr.startswith("_")
        ]
    assert private == []


def test_rows_are_written_by_one_module() -> None:
    writes = {"set_trial_user_attr", "set_trial_system_attr", "write_attributes"}
    # `_optuna` writes for `_records`, and what belongs to Optuna's own samplers.
    writers = {"_records", "_optuna"}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and node.attr in writes:
                through_records = ast.unparse(node.value) == "_records"
                assert layer_of(path) in writers or through_records, f"{path.name}: {node.attr}"
