"""The table of resources."""

from __future__ import annotations

from optuna_quota._resources import format_amount


def test_format_amount() -> None:
    assert format_amount("memory", None) == "unknown"
    assert format_amount("energy", 3.6e6) == "1 kWh"
    assert format_amount("disk_writes", 12.0) == "12"
