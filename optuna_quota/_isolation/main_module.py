"""Recreate the script's main module in a trial's process without running the script again.

A pickle refers to functions and classes of ``__main__`` by name, and the receiver must have them.
:mod:`multiprocessing` imports the script a second time for that, which needs an
``if __name__ == "__main__":`` guard. Here the statements to run are chosen from the syntax tree:
where there is a guard, all but the guarded ones; without a guard, only imports, definitions and
constants. Other globals are sent by value.
"""

from __future__ import annotations

import ast
import builtins
import collections
from collections.abc import Collection, Iterable, Iterator
import contextlib
from dataclasses import dataclass
import dis
import functools
import importlib.machinery
import inspect
import math
import os
import re
import sys
import tokenize
import types
from typing import Any, TypeGuard

from optuna_quota._isolation.modules import closure_variables, is_installed, module_frames


# The second is what multiprocessing's spawned workers call it.
MAIN_NAMES = ("__main__", "__mp_main__")


@dataclass(frozen=True)
class MainModule:
    """How to make the main module in a trial's process."""

    # The script; None without one, as in a notebook: everything is then sent by value
    file: str | None = None
    name: str | None = None  # The module that runs by ``-m``, else None
    package: str | None = None  # Its package, for relative imports
    statements: frozenset[int] = frozenset()  # The indices of the top-level statements to run
    # The names that these bind and nothing rebinds: such objects are sent by name
    names: frozenset[str] = frozenset()
    modified: int = 0  # When the script was last changed, in nanoseconds
    # Whether the fork server has created it; else the trial does
    is_made: bool = False

    def without_statements(self) -> MainModule:
        """Return the module without content, in case its statements fail."""
        return MainModule(self.file, self.name, self.package)


def find_main_module() -> MainModule:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    name = None if spec is None else spec.name
    file = getattr(main, "__file__", None)
    package = getattr(main, "__package__", None) or None
    if main is None or file is None or hasattr(main, "get_ipython") or is_installed(file):
        return MainModule(file, name, package)
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        modified = os.stat(file).st_mtime_ns
        line = running_line(main)
        whole = _can_import(main, _parse(file, modified), line)
        if _is_current(file, modified, vars(main)):
            chosen = _choose(file, modified, whole, math.inf if line is None else line)
            return MainModule(file, name, package, *chosen, modified)
    return MainModule(file, name, package)


def _can_import(main: types.ModuleType, tree: ast.Module, line: int | None) -> bool:
    """Return whether importing the script would not run the study again."""
    if main.__name__ == MAIN_NAMES[1]:
        # A worker of multiprocessing has just done so.
        return True
    guards = [s for s in tree.body if is_guard(s)]
    if line is None:
        return bool(guards)
    return any(s.lineno <= line <= (s.end_lineno or s.lineno) for s in guards)


@functools.lru_cache(maxsize=4)
def _choose(
    file: str, modified: int, whole: bool, line: float
) -> tuple[frozenset[int], frozenset[str]]:
    tree = _parse(file, modified)
    chosen = tree.body if whole else definitions(tree.body, line)
    places = frozenset(place for place, s in enumerate(tree.body) if s in chosen)
    return places, frozenset(bound_once(tree, chosen))


def make_main_module(found: MainModule) -> None:
    """Replace this process's main module; raises whatever its statements raise."""
    _former_mains.append(sys.modules.get("__main__"))
    main = types.ModuleType("__main__")
    if found.file is not None:
        main.__file__ = found.file
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", found.file)
    if found.name is not None:
        main.__spec__ = importlib.machinery.ModuleSpec(found.name, None)
    main.__package__ = found.package
    for name in MAIN_NAMES:
        sys.modules[name] = main
    if found.statements:
        exec(_compile(found), vars(main))


# Without a reference, the old main module would be cleared, with the code that runs.
_former_mains: list[types.ModuleType | None] = []


def running_line(main: types.ModuleType) -> int | None:
    """Return the line of the main module that is running, None if it has run to its end."""
    lines = [frame.f_lineno for frame in module_frames() if frame.f_globals is vars(main)]
    return lines[-1] if lines else None


def _compile(found: MainModule) -> types.CodeType:
    assert found.file is not None
    tree = _parse(found.file, found.modified)
    chosen = [tree.body[place] for place in sorted(found.statements)]
    body = [part for statement in chosen for part in _unguarded(statement)]
    return compile(ast.Module(body, []), found.file, "exec", dont_inherit=True)


@functools.lru_cache(maxsize=4)
def _parse(file: str, modified: int) -> ast.Module:
    with tokenize.open(file) as text:
        return ast.parse(text.read(), file)


def _is_current(file: str, modified: int, namespace: dict[str, Any]) -> bool:
    """Return whether the file still holds the code that runs here, not an edited version."""
    on_disk = _functions_on_disk(file, modified)
    functions = [v for v in list(namespace.values()) if isinstance(v, types.FunctionType)]
    return all(
        function.__code__ == on_disk.get(function.__name__, function.__code__)
        # A decorator's is compared by the function that it has wrapped.
        for function in map(inspect.unwrap, functions)
        if isinstance(function, types.FunctionType)
        and function.__module__ in MAIN_NAMES
        and function.__code__.co_filename == file
        and function.__code__.co_name == function.__qualname__
    )


@functools.lru_cache(maxsize=4)
def _functions_on_disk(file: str, modified: int) -> dict[str, types.CodeType]:
    """Return the code of the functions that are defined once, by name."""
    code = compile(_parse(file, modified), file, "exec", dont_inherit=True)
    found = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    counts = collections.Counter(c.co_name for c in found)
    return {c.co_name: c for c in found if counts[c.co_name] == 1}


def definitions(body: Iterable[ast.stmt], line: float = math.inf) -> list[ast.stmt]:
    """Return the imports, definitions and constants among statements.

    And what replaces a part of an imported library before a line, as in ``np.float = float``. A
    definition is left out if it immediately needs a name that is not defined, such as that of a
    decorator made by a call.
    """
    chosen: list[ast.stmt] = []
    known = set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    imported: set[str] = set()
    for statement in body:
        changed = _changed_names(statement)
        is_definition = _is_definition(statement) and changed <= imported
        if (
            is_definition
            and not (changed and statement.lineno > line)
            and needed_names(statement) <= known
        ):
            chosen.append(statement)
            known |= bound_names(statement)
            imported |= _imported_names(statement) - _OF_PROCESS
        else:
            known -= bound_names(statement)
    return chosen


# Attributes that a script has set there have their present values in trials.
_OF_PROCESS = {"os", "sys"}


def _changed_names(statement: ast.stmt) -> set[str]:
    """Return the names of the objects whose attributes a statement sets."""
    nodes = [node for node in _evaluated(statement) if isinstance(node, ast.Attribute)]
    return {_root_name(node) for node in nodes if isinstance(node.ctx, ast.Store)}


def _imported_names(statement: ast.stmt) -> set[str]:
    nodes = _evaluated(statement)
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name for node in imports for name in bound_names(node)}


_GUARDS = ("__name__ == '__main__'", "'__main__' == __name__")


def is_guard(statement: ast.stmt) -> TypeGuard[ast.If]:
    if not isinstance(statement, ast.If):
        return False
    tests = [statement.test]
    if isinstance(statement.test, ast.BoolOp) and isinstance(statement.test.op, ast.And):
        tests = statement.test.values
    return any(ast.unparse(test) in _GUARDS for test in tests)


def _unguarded(statement: ast.stmt) -> list[ast.stmt]:
    """Return the statements that an import would run: of a guard, those under ``else``."""
    return statement.orelse if is_guard(statement) else [statement]


def _is_definition(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.Pass, *_DEFINITIONS)):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        simple = all(isinstance(target, (ast.Name, ast.Attribute)) for target in targets)
        return simple and (statement.value is None or _is_constant(statement.value))
    if isinstance(statement, ast.If):
        inside = [*statement.body, *statement.orelse]
        return _is_constant(statement.test) and all(map(_is_definition, inside))
    if isinstance(statement, ast.Try):
        # Handlers of a failed import run here only if they did so in the study's process.
        inside = [*statement.body, *statement.orelse, *statement.finalbody]
        return all(map(_is_definition, inside))
    return False


_CALLING = (
    *(ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Starred),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


# Calls that only read, or create something to call later.
_PURE = {"functools.partial", "getattr", "hasattr", "partial"}


def _is_constant(expression: ast.expr) -> bool:
    """Return whether an expression has no iterations, assignments and calls except pure ones."""
    return not any(
        isinstance(node, _CALLING)
        and not (isinstance(node, ast.Call) and ast.unparse(node.func) in _PURE)
        for node in _evaluated(expression)
    )


def needed_names(statement: ast.stmt) -> set[str]:
    """Return the names that a definition looks up when it is executed, not when it is called."""
    found: set[str] = set()
    bound_within: set[str] = set()
    for node in _evaluated(statement):
        if isinstance(node, ast.Name):
            (bound_within if isinstance(node.ctx, ast.Store) else found).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom, *_DEFINITIONS)):
            bound_within |= bound_names(node)
    return found - bound_within


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _evaluated(root: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are evaluated immediately: all but the bodies of functions."""
    todo: list[ast.AST] = [root]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += [*node.decorator_list, node.args]
            todo += [node.returns] if node.returns is not None else []
        elif isinstance(node, ast.Lambda):
            todo.append(node.args)
        else:
            todo += ast.iter_child_nodes(node)


def bound_names(statement: ast.AST) -> set[str]:
    """Return the names that a statement binds or changes, in its own scope."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    found: set[str] = set()
    for node in _evaluated(statement):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= _exported_names(node.module)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, (*_DEFINITIONS, ast.ExceptHandler)):
            found.add(node.name or "")
        elif isinstance(node, _TARGETS) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(_root_name(node))
    return found - {""}


def _exported_names(module: str | None) -> set[str]:
    """Return the names that ``from module import *`` binds, of a module that is loaded."""
    namespace = vars(sys.modules.get(module or "", None) or types.ModuleType(""))
    names = namespace.get("__all__")
    return {n for n in namespace if not n.startswith("_")} if names is None else set(names)


_TARGETS = (ast.Name, ast.Attribute, ast.Subscript)


def _root_name(node: ast.expr) -> str:
    """Return the name at the root of ``name.attribute[index]``, "" where it is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def bound_once(tree: ast.Module, chosen: Collection[ast.stmt]) -> set[str]:
    """Return the names that one of the chosen statements binds and nothing else changes."""
    kept = {id(part) for s in chosen for part in _unguarded(s)}
    bindings: collections.Counter[str] = collections.Counter()
    changed: set[str] = set()
    for statement in tree.body:
        if id(statement) in kept:
            bindings.update(bound_names(statement))
        else:
            for part in statement.body if is_guard(statement) else [statement]:
                changed |= bound_names(part)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            changed |= set(node.names)
    return {name for name, count in bindings.items() if count == 1} - changed


# Instructions whose argument is the name of a global; in the body of a class, also of its own.
_OF_GLOBALS = {
    *("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"),
    *("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"),
}
# Functions that look up globals by text.
BY_TEXT = {"eval", "exec", "globals", "vars"}


@functools.lru_cache(maxsize=1024)
def names_in_code(code: types.CodeType, modules: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names of the globals that code, and the code within it, may use.

    ``modules`` are globals that lead to the main module, whose attributes are globals as well.
    """
    used = [each for each in dis.get_instructions(code) if each.opname in _OF_GLOBALS]
    names = {each.argval for each in used}
    if BY_TEXT & names:
        names.update(*(re.findall(r"[^\W\d]\w*", text) for text in _texts(code.co_consts)))
    # Not what the body of a class loads: that reads `__name__` in any case.
    leads = modules & {each.argval for each in used if each.opname == "LOAD_GLOBAL"}
    if leads or "__main__" in (*code.co_names, *code.co_consts):
        names.update(code.co_names)  # they may be attributes of that module
    within = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(names).union(*(names_in_code(each, modules) for each in within))


def _texts(constants: Iterable[Any]) -> Iterator[str]:
    for each in constants:
        if isinstance(each, str):
            yield each
        elif isinstance(each, (tuple, frozenset)):
            yield from _texts(each)


def global_names(value: Any) -> set[str]:
    """Return the names of the globals that a function, class or callable of a script may use."""
    main = sys.modules["__main__"]
    itself = (name for name, held in vars(main).copy().items() if held is main)
    modules = frozenset(["__name__", *itself])
    names: set[str] = set()
    seen: set[int] = set()
    todo = [value]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, types.CodeType):
            names |= names_in_code(part, modules)
        elif isinstance(part, type):
            if part.__module__ in MAIN_NAMES:
                todo += [*vars(part).values(), *part.__bases__]
        elif isinstance(part, types.FunctionType):
            todo += [part.__code__, *vars(part).values(), *closure_variables(part).values()]
        elif isinstance(part, property):
            todo += [part.fget, part.fset, part.fdel]
        elif isinstance(part, functools.partial):
            todo.append(part.func)
        else:
            # A method, or a decorator's object such as that of `functools.lru_cache`.
            todo.append(getattr(part, "__func__", None) or getattr(part, "__wrapped__", None))
    return names
