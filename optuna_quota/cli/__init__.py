"""The command line ``optuna-quota``: each subcommand is a module that adds its parser and runs."""

from optuna_quota.cli.main import main


__all__ = ["main"]
