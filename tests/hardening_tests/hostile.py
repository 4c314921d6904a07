"""Hypothesis strategies for hostile JSON in the attributes of a study and its trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
import optuna
from optuna.trial import TrialState

from optuna_quota import _records


# Each one runs, loads or breaks out of its context where it is not escaped.
MARKUP = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '"><iframe src="javascript:alert(1)">',
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "| a | b |\n| --- | --- |\n# heading\n```\ncode",
    "{{7*7}} ${7*7} %(x)s {0} \\u003cscript>",
    "__import__('os').system('true')",
    "\x1b[31mred\x1b[0m\x00\x07\r\n",
    "😀\u202egnp.exe\u2028x",
)
LONG = "A" * 20_000
NUMBERS = (0, -1, 1e308, -1e308, 10**300, 10**400, 2**63, 5e-324, 1e18, True)
TEXT_NUMBERS = ("NaN", "Infinity", "-inf", "1e999", "0x10", "4GiB", "")


def nested(depth: int) -> Any:
    """Return lists nested to a depth."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXT_NUMBERS),
    st.sampled_from(MARKUP),
    st.just(LONG),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
NAMES = (
    *("memory", "wall_time", "cpu_time", "gpu_memory", "trial_time", "n_trials", "energy", "cost"),
    *("resource", "limit", "observed", "seconds", "quota", "forecast", "lower", "median", "upper"),
    *(
        "trial",
        "granted",
        "asked",
        "waits",
        "worker",
        "began",
        "beat",
        "every",
        "used",
        "charged",
        "gpu",
    ),
    *("host", "machine", "space", "pid", "started", "after", "action", "params", "probability"),
    *("__class__", "<b>x</b>", ""),
)
values = st.one_of(
    st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=8),
        ),
        max_leaves=16,
    ),
    st.just(nested(60)),
)

TRIAL_KEYS = (
    *(_records.OUTCOME, _records.REASON, _records.BREACH, _records.FOOTPRINT),
    *(_records.ISOLATION, _records.HOST, _records.PROPOSED, _records.TIMELINE),
    *(_records.PREFIX + name for name in ("memory", "wall_time", "cpu_time", "gpu_memory")),
    *(_records.PREFIX + name for name in ("gpu_time", "energy", "my_meter", "<i>m</i>", "")),
)
TRIAL_SYSTEM_KEYS = (_records.RESERVATION, _records.TIMELINE)
STUDY_KEYS = (_records.STUDY_QUOTA, _records.STUDY_LIMITS, _records.STUDY_PRICES)
STUDY_SYSTEM_KEYS = (_records.STUDY_PUBLISHED,)


def row(number: int, hostile: Mapping[str, Any], system: Mapping[str, Any]) -> Any:
    """Return a finished trial with some usage and the given attributes."""
    state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)[number % 3 if number else 0]
    x = (number % 7) / 7 + 0.01
    plain = {
        "quota:memory": 1e8 * (1 + x),
        "quota:wall_time": 1 + x,
        "quota:cpu_time": 1 + 2 * x,
        "quota:outcome": {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}[
            state.name
        ],
        "quota:isolation": "process",
    }
    return optuna.trial.create_trial(
        state=state,
        value=x if state == TrialState.COMPLETE else None,
        params={"x": x, "kind": "ab"[number % 2]},
        distributions={
            "x": optuna.distributions.FloatDistribution(0, 2),
            "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
        },
        user_attrs={**plain, **hostile},
        system_attrs=dict(system),
    )


trial_attributes = st.dictionaries(st.sampled_from(TRIAL_KEYS), values, max_size=6)
system_attributes = st.dictionaries(st.sampled_from(TRIAL_SYSTEM_KEYS), values, max_size=2)
study_attributes = st.dictionaries(st.sampled_from(STUDY_KEYS), values, max_size=3)
study_system_attributes = st.dictionaries(st.sampled_from(STUDY_SYSTEM_KEYS), values, max_size=1)
