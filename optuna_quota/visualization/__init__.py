"""Pictures of a study's use of resources, in the manner of :mod:`optuna.visualization`.

Each function takes a study and returns a plotly figure; plotly is loaded when the first one is
drawn (``pip install 'optuna-quota[plot]'``). Amounts are shown in units that a person reads,
colours are those of Okabe and Ito, and each outcome has a symbol of its own.
"""

from optuna_quota.visualization._burn_down import plot_burn_down
from optuna_quota.visualization._charts import figures
from optuna_quota.visualization._correlations import plot_correlations
from optuna_quota.visualization._footprint import plot_footprint
from optuna_quota.visualization._quality import plot_quality_cost
from optuna_quota.visualization._report import notebook_html
from optuna_quota.visualization._report import to_html
from optuna_quota.visualization._slice import plot_usage_slice
from optuna_quota.visualization._timeline import plot_timeline
from optuna_quota.visualization._usage import plot_usage
from optuna_quota.visualization._waste import plot_waste


__all__ = [
    "figures",
    "plot_burn_down",
    "plot_correlations",
    "plot_footprint",
    "plot_quality_cost",
    "plot_timeline",
    "plot_usage",
    "plot_usage_slice",
    "plot_waste",
    "notebook_html",
    "to_html",
]
