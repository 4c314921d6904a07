"""A study's use of resources in optuna-dashboard, the place where the study is looked at.

Usage stands in the trial table by itself: it is kept as numeric attributes. What this package adds
are a block in the study's note, notes on trials that were terminated or rejected, and four small
plots. Publishing again replaces all of it and touches nothing that a person wrote.

Example:

    .. code-block:: python

        from optuna_quota import analyze
        from optuna_quota.dashboard import Publisher

        study.optimize(objective, n_trials=200, callbacks=[Publisher()])
        analyze(study).publish()
"""

from optuna_quota.dashboard._publish import publish
from optuna_quota.dashboard._publish import Publisher


__all__ = ["Publisher", "publish"]
