"""Private parts of Optuna that can't be avoided, and what differs between its versions.

No other module uses a private name of Optuna. ``tests/test_optuna.py`` fails when Optuna changes
any of them.
"""

from optuna_quota._optuna.optimize import *  # noqa: F403 - all of its public names
from optuna_quota._optuna.samplers import *  # noqa: F403
from optuna_quota._optuna.storages import *  # noqa: F403
