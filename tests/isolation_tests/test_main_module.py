"""Statements of a script that a trial's main module runs, chosen from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path
import sys
import types

import pytest

from optuna_quota._isolation import main_module
from optuna_quota._isolation.main_module import (
    bound_names,
    bound_once,
    definitions,
    find_main_module,
    is_guard,
    MainModule,
    make_main_module,
    needed_names,
    running_line,
)


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ('__name__ == "__main__"', True),
        ("'__main__' == __name__", True),
        ('(__name__ == "__main__")', True),
        ('__name__ == "__main__" and DEBUG', True),
        ('DEBUG and __name__ == "__main__"', True),
        ('__name__ == "__main__" or DEBUG', False),
        ('__name__ != "__main__"', False),
        ('not __name__ == "__main__"', False),
        ('__name__ == "__mp_main__"', False),
        ('name == "__main__"', False),
        ('__name__ in ("__main__",)', False),
        ('__name__ == "__main__" == DEBUG', False),
        ("True", False),
    ],
)
def test_is_guard(test: str, expected: bool) -> None:
    (statement,) = ast.parse(f"if {test}:\n    pass").body
    assert is_guard(statement) is expected


def test_only_an_if_is_a_guard() -> None:
    (statement,) = ast.parse('while __name__ == "__main__":\n    pass').body
    assert not is_guard(statement)


# Each line of a script; those to run are marked by "#+".
CHOSEN = {
    "imports": """
        import os  #+
        import os.path as p, sys  #+
        from math import pi  #+
        """,
    "what it does": """
        import optuna  #+
        print("runs")
        study = optuna.create_study()
        study.optimize(print)
        for x in range(3): print(x)
        while False: pass
        with open("x") as file: file.read()
        assert study
        del study
        """,
    "docstrings and constants": """
        "A script."  #+
        ...  #+
        SIZE = 3  #+
        NAMES = ["a", f"b{SIZE}"]  #+
        TABLE = {"a": (1, -2), "b": SIZE * 2}  #+
        FIRST = NAMES[0]  #+
        width: int = 4  #+
        later: int  #+
        twice = lambda x: 2 * unknown(x)  #+
        A = B = 1  #+
        a, b = 1, 2
        TABLE["c"] = 3
        SIZE += 1
        DATA = load()
        SQUARES = [x * x for x in NAMES]
        WALRUS = (y := 3)
        """,
    "functions look up their names when called": """
        def f(x): return load(x) + unknown  #+
        async def g(): await unknown  #+
        def h(x=3, *, y="a"): return x  #+
        """,
    "decorators": """
        import functools  #+
        import dataclasses  #+
        @functools.lru_cache  #+
        def f(): pass
        @functools.lru_cache(maxsize=3)  #+
        def g(): pass
        @dataclasses.dataclass(frozen=True)  #+
        class A: x: int = 3
        app = make_app()
        @app.command()
        def h(): pass
        @unknown
        class B: pass
        """,
    "defaults and annotations are looked up at once": """
        from typing import Any  #+
        DATA = load()
        def f(x=DATA): pass
        def g(x: DATA): pass
        def h(x: Any) -> DATA: pass
        def i(*, x=len(DATA)): pass
        k = lambda x=DATA: x
        def j(x: Any) -> Any: return DATA  #+
        """,
    "bases and bodies of classes": """
        import enum  #+
        from collections import namedtuple  #+
        Base = make_base()
        class A(Base): pass
        class B(A): pass
        class C(enum.Enum): X = 1; Y = 2  #+
        class D(C, metaclass=enum.EnumMeta): pass  #+
        class E(namedtuple("E", "x y")): pass  #+
        class F: size = len(DATA)
        class G: width = 3; half = width / 2  #+
        class H:  #+
            import os as o
            def f(self): return DATA
            g = f
            class I: pass
            j = I
        """,
    "a name taken back": """
        import json  #+
        def f(x): pass  #+
        f = wrap(f)
        class A(object): tool = f
        class B(object): tool = json  #+
        del json
        class C(object): tool = json
        """,
    "parts of libraries": """
        import functools, os, ssl  #+
        import torch.hub as hub, numpy as np  #+
        ssl._create_default_https_context = ssl._create_unverified_context  #+
        hub.load = functools.partial(hub.load, trust_repo=True)  #+
        if not hasattr(np, "float"): np.float = float  #+
        np.array.cache.size = 3  #+
        os.environ = {}
        hub.tools["a"] = 3
        model = hub.make()
        model.lr = 3
        np.bool = make()
        np.int = int
        """,
    "ways to import": """
        try: import tomllib  #+
        except ImportError: tomllib = None
        import sys  #+
        if sys.version_info >= (3, 8): from typing import Final  #+
        else: from typing_extensions import Final
        try: import x
        except ImportError: print("none"); x = load()
        finally: print("done")
        if sys.stdin.isatty(): import readline
        """,
}


@pytest.mark.parametrize("case", CHOSEN)
def test_definitions(case: str) -> None:
    lines = [line[8:] for line in CHOSEN[case].strip("\n").splitlines()]
    chosen = definitions(ast.parse("\n".join(lines)).body)
    found = {
        min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", ()))]) for s in chosen
    }
    assert [lines[n - 1] for n in sorted(found)] == [x for x in lines if x.endswith("#+")]


def test_names_of_a_star_import() -> None:
    chosen = definitions(ast.parse("from enum import *\nclass A(Enum): X = auto").body)
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a, b=x, *, c=y): return z", {"x", "y"}),
        ("def f(a: x, *b: y, **c: z) -> w: pass", {"x", "y", "z", "w"}),
        ("@x(y.z)\ndef f(): pass", {"x", "y"}),
        ("class A(x.B, metaclass=y): a = z", {"x", "y", "z"}),
        ("class A:\n  a = 1\n  b = a\n  def f(self): return x", set()),
        ("a = x.y[z]", {"x", "z"}),
        ("a = lambda b=x: y", {"x"}),
        ("import a.b", set()),
        ("if x: import a\nelse: a = y", {"x", "y"}),
    ],
)
def test_needed_names(source: str, expected: set[str]) -> None:
    (statement,) = ast.parse(source).body
    assert needed_names(statement) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c.d as e", {"a", "e"}),
        ("from a import b, c as d", {"b", "d"}),
        ("def f(): g = 1", {"f"}),
        ("class A: x = 1", {"A"}),
        ("a = b, c = 1, 2", {"a", "b", "c"}),
        ("a.b.c = 1", {"a"}),
        ("a.b['c'][0] += 1", {"a"}),
        ("(lambda: 0).x = 1", set()),
        ("del a", {"a"}),
        ("for a, (b, *c) in x: d = a", {"a", "b", "c", "d"}),
        ("with x as a: pass", {"a"}),
        ("if (a := 1): pass", {"a"}),
        ("try: a = 1\nexcept E as e: b = 1", {"a", "b", "e"}),
        ("try: import a\nexcept E: a = None", {"a"}),
        ("if x:\n  def f(): g = 1\n  class A: pass", {"f", "A"}),
        ("f(a)", set()),
    ],
)
def test_bound_names(source: str, expected: set[str]) -> None:
    (statement,) = ast.parse(source).body
    assert bound_names(statement) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): pass", {"f"}),
        ("def f(): pass\ndef f(): pass", set()),
        ("def f(): pass\nf = wrap(f)", set()),
        ("def f(): pass\nf.calls = load()", set()),
        ("def f(): pass\ndef g():\n  global f\n  f = 1", {"g"}),
        ("class A: pass\nA.size = load()", set()),
        ("class A: pass\nfor A.x in load(): pass", set()),
        ("class A: pass\nx = A()", {"A"}),
        ("try: import json\nexcept ImportError: json = None", {"json"}),
        ("def f(): pass\nif __name__ == '__main__':\n  f = 3", set()),
        ("def f(): pass\nif __name__ == '__main__':\n  pass\nelse:\n  f = 3", {"f"}),
        ("SIZE = 1\nSIZE += load()", set()),
        ("import os\nos.environ['X'] = load()", set()),
    ],
)
def test_bound_once(source: str, expected: set[str]) -> None:
    tree = ast.parse(source)
    assert bound_once(tree, definitions(tree.body)) == expected


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Restore the main modules afterwards; return where a script may be."""
    for name in main_module.MAIN_NAMES:
        module = sys.modules.get(name) or types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path / "script.py"


def run_script(file: Path, source: str, name: str = "__main__") -> types.ModuleType:
    """Run a script as the main module, whose `find()` returns how it would be made anew."""
    file.write_text(source)
    module = types.ModuleType(name)
    module.__file__ = str(file)
    vars(module)["find"] = find_main_module
    sys.modules["__main__"] = module
    exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    return module


def made(found: MainModule) -> dict[str, object]:
    make_main_module(found)
    return vars(sys.modules["__main__"])


GUARDED = """\
ORDER = ["top"]
def f(): return helper()
def helper(): return 3
ORDER.append("bottom")
if __name__ == "__main__":
    ORDER.append("guard")
    found = find()
else:
    ORDER.append("else")
ORDER.append("after")
"""


def test_a_guarded_script_is_made_as_an_import_would(main: Path) -> None:
    found = run_script(main, GUARDED).found
    assert found.names == {"f", "helper"} | {"ORDER"}
    again = made(found)
    assert again["ORDER"] == ["top", "bottom", "else", "after"]
    assert again["__name__"] == "__main__" and again["__file__"] == str(main)
    assert sys.modules["__mp_main__"] is sys.modules["__main__"]


def test_several_statements_on_a_line(main: Path) -> None:
    found = run_script(main, "import os; DATA = list(); SIZE = 2; found = find()\n").found
    assert found.names == {"os", "SIZE"}
    assert made(found).keys() >= {"os", "SIZE"} and "DATA" not in made(found)


def test_a_study_outside_of_the_guard_is_not_run_again(main: Path) -> None:
    source = "def f(): return 3\nRUNS = list()\nfound = find()\nif __name__ == '__main__': pass\n"
    found = run_script(main, source).found
    assert found.names == {"f"}
    assert "RUNS" not in made(found)


def test_an_unguarded_script_has_definitions_only(main: Path) -> None:
    source = "import os\nSIZE = 2\ndef f(): return os.sep * SIZE\nDATA = list()\nfound = find()\n"
    found = run_script(main, source).found
    assert found.names == {"os", "SIZE", "f"}
    assert made(found).keys() >= {"os", "SIZE", "f"} and "DATA" not in made(found)


def test_a_script_that_has_run_to_its_end(main: Path) -> None:
    whole = run_script(main, "DATA = list()\nif __name__ == '__main__': pass\n")
    assert running_line(whole) is None and "DATA" in made(find_main_module())
    run_script(main, "DATA = list()\n")
    assert "DATA" not in made(find_main_module())


def test_a_worker_of_multiprocessing(main: Path) -> None:
    found = run_script(main, "DATA = list()\ndef f(): pass\nfound = find()\n", "__mp_main__").found
    assert found.names == {"DATA", "f", "found"}


@pytest.mark.parametrize(
    "edited",
    ["def f(): return 4\nfound = find()\n", "def f(: oops\n", None],
    ids=["changed", "broken", "gone"],
)
def test_a_file_that_was_edited_since_is_not_used(main: Path, edited: str | None) -> None:
    run_script(main, "def f(): return 3\nfound = find()\n")
    main.unlink()
    if edited is not None:
        main.write_text(edited)
    assert find_main_module() == MainModule(str(main))


def test_an_edit_outside_of_functions_does_not_matter(main: Path) -> None:
    run_script(main, "def f(): return 3\nfound = find()\n")
    main.write_text("def f(): return 3\nfound = find()\n\n# A remark.\n")
    assert find_main_module().names == {"f"}


def test_an_edit_of_a_decorated_function_is_noticed(main: Path) -> None:
    source = (
        "import functools\ndef wrap(f): return functools.wraps(f)(lambda: f())\n"
        "@wrap\ndef h(): return 3\nfound = find()\n"
    )
    run_script(main, source)
    main.write_text(source.replace("3", "4"))
    assert find_main_module() == MainModule(str(main))


def test_decorated_and_repeated_functions_do_not_look_edited(main: Path) -> None:
    source = (
        "import functools\ndef g(): return 1\ndef g(): return 2\n"
        "def wrap(f): return functools.wraps(f)(lambda: f())\n"
        "@wrap\ndef h(): return 3\nfound = find()\n"
    )
    assert run_script(main, source).found.names == {"functools", "wrap", "h"}


@pytest.mark.parametrize("attribute", ["file", "ipython", "installed"])
def test_without_a_script_all_goes_by_value(main: Path, attribute: str) -> None:
    module = run_script(main, "def f(): pass\n")
    if attribute == "file":
        module.__file__ = None
    elif attribute == "ipython":
        vars(module)["get_ipython"] = print
    else:
        module.__file__ = pytest.__file__
    found = find_main_module()
    assert not found.statements and not found.names


def test_an_exception_of_the_module_is_raised(main: Path) -> None:
    found = run_script(main, "x = 1\nif __name__ == '__main__':\n    found = find()\n").found
    main.write_text("raise KeyError('x')\nif __name__ == '__main__':\n    found = find()\n")
    main_module._parse.cache_clear()
    with pytest.raises(KeyError):
        make_main_module(found)
    assert "x" not in made(found.without_statements())
