"""The command line ``optuna-quota``.

Each subcommand is a module with ``add_parser`` and ``run``: it parses its arguments, calls the
function of the same name, and prints.
"""

from __future__ import annotations

from optuna_quota.cli.main import main


__all__ = ["main"]
