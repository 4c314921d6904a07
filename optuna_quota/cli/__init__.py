"""The command line ``optuna-quota``: what the library does, without writing Python.

Each subcommand is a module with ``add_parser`` and ``run``. Nothing here decides anything about
quotas: a command reads its arguments, calls the function of the same name, and prints.
"""

from __future__ import annotations

from optuna_quota.cli.main import main


__all__ = ["main"]
