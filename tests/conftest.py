"""Settings of the whole test suite."""

from __future__ import annotations

from hypothesis import HealthCheck
from hypothesis import settings


# Test machines are shared and slow at times: a slow draw is no failure.
settings.register_profile(
    "optuna_quota", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("optuna_quota")
