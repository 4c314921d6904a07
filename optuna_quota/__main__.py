"""``python -m optuna_quota`` is the command line."""

from __future__ import annotations

import sys

from optuna_quota.cli import main


if __name__ == "__main__":
    sys.exit(main())
