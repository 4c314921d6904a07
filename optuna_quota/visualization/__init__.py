"""Plots of a study's resource usage, in the manner of :mod:`optuna.visualization`.

Each function takes a study and returns a plotly figure; plotly is imported with the first one
(``pip install 'optuna-quota[plot]'``). Amounts have readable units, the colours suit the common
kinds of colour blindness, and each outcome has its own symbol.
"""

from optuna_quota.visualization._cost import plot_burn_down, plot_quality_cost, plot_waste
from optuna_quota.visualization._figures import figures
from optuna_quota.visualization._footprint import plot_footprint, plot_reliability
from optuna_quota.visualization._html_report import notebook_html, to_html
from optuna_quota.visualization._params import plot_correlations, plot_usage_slice
from optuna_quota.visualization._usage import plot_timeline, plot_usage


__all__ = [
    "figures",
    "plot_burn_down",
    "plot_correlations",
    "plot_footprint",
    "plot_quality_cost",
    "plot_reliability",
    "plot_timeline",
    "plot_usage",
    "plot_usage_slice",
    "plot_waste",
    "notebook_html",
    "to_html",
]
