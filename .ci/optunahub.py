"""Generates the packages for OptunaHub, a sampler and a pruner, from the source.

    python .ci/optunahub.py FOLDER

writes ``FOLDER/package/samplers/quota`` and ``FOLDER/package/pruners/quota``, ready to be copied
into a clone of the registry. They depend on the released distribution rather than carry a copy of
it, so that a user has one library, whichever way it came.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
import inspect
import json
from pathlib import Path
import re
import sys
import textwrap


sys.path.insert(0, str(Path(__file__).parents[1]))

import optuna

import optuna_quota


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Package:
    """One package of the registry."""

    category: str
    export: str
    title: str
    description: str
    abstract: str
    example: str

    @property
    def tag(self) -> str:
        return self.category.removesuffix("s")


_EXAMPLE = """\
import optuna
import optunahub


QuotaSampler = optunahub.load_module("samplers/quota").QuotaSampler
QuotaPruner = optunahub.load_module("pruners/quota").QuotaPruner


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -10, 10)
    y = trial.suggest_int("y", -10, 10)
    return x**2 + y**2


if __name__ == "__main__":
    from optuna_quota import Limits, Quota, analyze

    study = optuna.create_study(
        sampler=QuotaSampler(optuna.samplers.TPESampler(), quota=Quota(wall_time="10min")),
        pruner=QuotaPruner(limits=Limits(memory="4GiB", wall_time="1min")),
    )
    study.optimize(objective, n_trials=30)
    print(analyze(study).summary())
"""

PACKAGES = (
    Package(
        "samplers",
        "QuotaSampler",
        "Sampler within a computing-resource quota",
        "Wraps any sampler: rejects a study and redraws points whose projected memory, time, GPU "
        "or energy use does not fit a quota, and learns the footprint from finished trials.",
        "Wraps any sampler and keeps the whole study, over all its workers, within a quota of "
        "time, CPU, GPU, memory, energy or cost. What will not fit is rejected before it runs; "
        "what each trial used is measured and teaches the next projection.",
        _EXAMPLE,
    ),
    Package(
        "pruners",
        "QuotaPruner",
        "Pruner that ends trials over their resource limits",
        "Wraps any pruner: a trial that is over its limit of memory, time, CPU or GPU use is "
        "terminated, recorded as such and told to the sampler as a constraint.",
        "Wraps any pruner and ends a trial that is over a limit of memory, wall time, CPU or GPU "
        "use. In process the stop is a cooperative one; with `optuna_quota.isolated` each trial "
        "runs in a child process that can be killed at any instant.",
        _EXAMPLE,
    ),
)


def write_package(package: Package, folder: Path) -> Path:
    """Write one package below a folder and return where it is."""
    place = folder / "package" / package.category / "quota"
    place.mkdir(parents=True, exist_ok=True)
    files = {
        "__init__.py": _module(package.export),
        "README.md": _readme(package),
        "example.py": package.example,
        "requirements.txt": f"optuna-quota>={optuna_quota.__version__}\n",
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    return place


def _module(export: str) -> str:
    return f'from optuna_quota import {export}\n\n\n__all__ = ["{export}"]\n'


def _readme(package: Package) -> str:
    load = f'optunahub.load_module("{package.category}/quota").{package.export}'
    return f"""\
---
author: The optuna_quota authors
title: {json.dumps(package.title)}
description: {json.dumps(package.description)}
tags: [{package.tag}, resource limits, quota, memory, GPU]
optuna_versions: [{optuna.__version__}]
license: MIT License
---

## Abstract

{textwrap.fill(package.abstract, 99)}

## APIs

- `{load}`

{_as_markdown(inspect.getdoc(getattr(optuna_quota, package.export)) or "")}

## Installation

```shell
pip install optunahub 'optuna-quota>={optuna_quota.__version__}'
```

## Example

```python
{package.example.rstrip()}
```
"""


def _as_markdown(docstring: str) -> str:
    """Return a docstring without its example, which stands below, as Markdown."""
    text = re.sub(r"^Example:\n(?:\n| .*\n)+", "", docstring, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = text.replace("``", "`")
    text = re.sub(r"^(\w+):$", r"**\1**\n", text, flags=re.MULTILINE)
    return re.sub(r"^ {4}(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)


def main() -> None:
    """Write both packages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for package in PACKAGES:
        sys.stdout.write(f"{write_package(package, folder)}\n")


if __name__ == "__main__":
    main()
