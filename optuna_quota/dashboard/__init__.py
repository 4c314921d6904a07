"""Publishes a study's resource usage to optuna-dashboard.

The trial table shows usage by itself, from numeric attributes. This package adds a block in the
study's note, notes on terminated and rejected trials, and four small plots. Publishing again
replaces all of it and keeps what a person wrote.

Example:

    .. code-block:: python

        from optuna_quota import analyze
        from optuna_quota.dashboard import Publisher

        study.optimize(objective, n_trials=200, callbacks=[Publisher()])
        analyze(study).publish()
"""

from optuna_quota.dashboard._publish import publish, Publisher


__all__ = ["Publisher", "publish"]
