"""What users type stays as it is, unless someone changes ``public_api.txt`` on purpose.

``python -m tests.packaging_tests.test_public_api`` writes that file anew.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
import textwrap
from typing import Any

import pytest

import optuna_quota


API = Path(__file__).with_name("public_api.txt")
NAMES = [name for name in optuna_quota.__all__ if name != "__version__"]
CLASSES = [name for name in NAMES if inspect.isclass(getattr(optuna_quota, name))]
FUNCTIONS = [name for name in NAMES if name not in CLASSES]
# Users are given these and never build them.
RESULTS = {
    "Footprint",
    "LedgerStatus",
    "Meter",
    "Projection",
    "ReplayReport",
    "UtilizationReport",
}


def parameters(function: Any) -> str:
    """Names, kinds and defaults; annotations may become more precise."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    bare = [p for p in bare if p.name not in ("self", "cls")]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def constructor_of(value: Any) -> Any:
    return value.__init__ if inspect.isclass(value) and "__init__" in vars(value) else value


def describe(name: str) -> list[str]:
    value = getattr(optuna_quota, name)
    if not inspect.isclass(value):
        return [f"{name}{parameters(value)}"]
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    lines = [
        f"class {name}{parameters(constructor_of(value))}" + (f" is {bases}" if bases else "")
    ]
    for member in members_of(value):
        found = inspect.getattr_static(value, member)
        function = getattr(found, "__func__", found)
        shown = parameters(function) if inspect.isfunction(function) else ""
        lines.append(f"    {member}{shown}")
    annotated = inspect.get_annotations(value)
    fields = [f for f in annotated if not f.startswith("_") and f not in vars(value)]
    return lines + [f"    {field}" for field in sorted(fields)]


def members_of(value: type) -> list[str]:
    """Public members, those of private base classes included."""
    bases = [b for b in value.__mro__[1:] if b.__module__.startswith("optuna_quota.")]
    private = [base for base in bases if base.__name__ not in NAMES]
    found = {member for owner in (value, *private) for member in vars(owner)}
    return sorted(member for member in found if not member.startswith("_"))


def api() -> str:
    return "\n".join(line for name in NAMES for line in describe(name)) + "\n"


def test_names_and_signatures_are_frozen() -> None:
    now = api()
    assert now == API.read_text(encoding="utf-8"), f"if it is meant, {API.name} becomes:\n\n{now}"


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_explained_with_an_example(name: str) -> None:
    value = getattr(optuna_quota, name)
    text = inspect.getdoc(value)
    assert text and value.__doc__, f"{name} has no docstring of its own"
    assert "Example:" in text
    assert ".. code-block:: python" in text
    ast.parse(code_of(text))
    if not inspect.isclass(value) or not (issubclass(value, Exception) or name in RESULTS):
        assert "Args:" in text
        for parameter in inspect.signature(constructor_of(value)).parameters:
            if parameter not in ("self", "args", "kwargs", "_"):
                assert f"{parameter}:" in text, f"{name} does not explain {parameter}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_of_public_functions_are_documented(name: str) -> None:
    value = getattr(optuna_quota, name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)):
        assert "Raises:" in (inspect.getdoc(value) or "")


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_has_a_docstring(name: str) -> None:
    value = getattr(optuna_quota, name)
    for member in members_of(value):
        found = inspect.getattr_static(value, member)
        function = getattr(
            found, "__func__", getattr(found, "fget", getattr(found, "func", found))
        )
        if inspect.isfunction(function):
            assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


def code_of(text: str) -> str:
    """Return the first block of code."""
    _, _, rest = text.partition(".. code-block:: python\n\n")
    indent = len(rest) - len(rest.lstrip(" "))
    lines = []
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" " * indent):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


if __name__ == "__main__":
    API.write_text(api(), encoding="utf-8")
