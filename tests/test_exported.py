"""Exported names resolve, and importing the package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import optuna_quota


def test_every_exported_name_resolves() -> None:
    for name in optuna_quota.__all__:
        assert getattr(optuna_quota, name) is not None
    assert set(optuna_quota.__all__) == {*optuna_quota._HOMES, "__version__"}
    assert list(optuna_quota.__all__) == sorted(optuna_quota.__all__)
    assert set(optuna_quota.__all__) <= set(dir(optuna_quota))


def test_import_loads_no_heavy_module() -> None:
    code = (
        "import sys, optuna_quota; "
        "print([m for m in ('optuna', 'statsmodels', 'pandas', 'plotly', 'scipy', 'pynvml', "
        "'psutil') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
