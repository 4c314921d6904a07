"""The analysis of a study: its test of formulas, and what it imports."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import wilcoxon

from optuna_quota._analysis.study_analysis import signed_rank_test


@pytest.mark.parametrize("n", [1, 8, 31, 90])
@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.3])
def test_the_signed_rank_test_is_that_of_scipy(n: int, shift: float) -> None:
    differences = np.random.default_rng(n).normal(shift, 1.0, n)
    expected = wilcoxon(differences, alternative="greater", method="exact").pvalue
    assert signed_rank_test(differences) == pytest.approx(expected)


def test_equal_and_absent_differences() -> None:
    assert signed_rank_test(np.zeros(5)) == 1.0
    assert signed_rank_test(np.array([1.0, 1.0, 0.0, -1.0])) == 3 / 8


_SUMMARY = """
import sys
from tests.analysis_tests.studies import power_law_study
from optuna_quota import analyze
print(len(analyze(power_law_study(60, limit=2e9)).summary()))
print([name for name in ("scipy.stats", "statsmodels") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_summary_imports_nothing_that_is_slow_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", _SUMMARY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    length, slow = done.stdout.split("\n")[-3:-1]
    assert int(length) > 1000 and slow == "[]"
