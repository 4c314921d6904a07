"""What `analyze` returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from html import escape
from importlib import import_module
import os
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quota import _records
from optuna_quota._analysis.advice import Advice
from optuna_quota._analysis.advise import advise
from optuna_quota._analysis.correlations import correlations
from optuna_quota._analysis.fronts import best_numbers
from optuna_quota._analysis.fronts import is_feasible
from optuna_quota._analysis.summary import summarize
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import read_observation
from optuna_quota._utilization.data import study_data
from optuna_quota._utilization.data import StudyData
from optuna_quota._utilization.model import fit_utilization_models
from optuna_quota._utilization.model import UtilizationModel
from optuna_quota._utilization.model import with_censored_peaks


if TYPE_CHECKING:
    from numpy.typing import NDArray
    from optuna.study import Study
    import pandas as pd


class UtilizationReport:
    """What drove the use of resources in a study, as it stood when :func:`analyze` was called.

    Each part is computed when it is first asked for and kept.

    Example:

        .. code-block:: python

            report = analyze(study)
            print(report.summary())
            report.to_html("report.html")

    Attributes:
        study: The study.
        data: Its finished trials as arrays.
        quota: The study's quota by resource in SI base units, as its attributes keep it.
        limits: Its limits likewise.
    """

    def __init__(self, study: Study, data: StudyData) -> None:
        self.study = study
        self.data = data
        attributes = study.user_attrs
        self.quota = _records.read_amounts(attributes.get(_records.STUDY_QUOTA))
        self.limits = _records.read_amounts(attributes.get(_records.STUDY_LIMITS))

    @property
    def table(self) -> pd.DataFrame:
        """The trial table of the finished trials, as :func:`trial_table` gives it."""
        return self.data.table

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """A row for each parameter and resource, the strongest of each resource first.

        The columns are ``param``, ``resource``, ``rho`` (Spearman's, or for a category the effect
        size ε² of Kruskal and Wallis, as ``measure`` says), ``lower`` and ``upper`` (95%),
        ``p_value``, ``p_adjusted`` (Holm, over all tests of the study), ``n``, ``measure`` and
        ``branch`` (the choices under which a conditional parameter is active).
        """
        return correlations(with_censored_peaks(self.data, self.models))

    @property
    def models(self) -> dict[str, UtilizationModel]:
        """The fitted models by resource: a floor plus a power law each.

        Each has ``.coefficients`` (DataFrame indexed by term: ``estimate, lower, upper, p_value,
        kind``), ``.formula``, ``.diagnostics`` (warnings in words), ``.predict(params)``,
        ``.curve(param)`` and ``.results``, the statsmodels results, whose attributes are the
        model's too. A resource without one is in :attr:`missing_models`.
        """
        return self._fitted[0]

    @property
    def missing_models(self) -> dict[str, str]:
        """Why a resource has no model, in a sentence, by resource."""
        return self._fitted[1]

    @cached_property
    def _fitted(self) -> tuple[dict[str, UtilizationModel], dict[str, str]]:
        return fit_utilization_models(self.data)

    @cached_property
    def footprint(self) -> Footprint:
        """What was learned of footprints, for ``QuotaSampler(footprint=…)`` of a next study."""
        trials = self.study.get_trials(deepcopy=False)
        rows = [read_observation(t) for t in trials if t.number in self._numbers]
        return Footprint.fit([row for row in rows if row is not None])

    @cached_property
    def best(self) -> list[int]:
        """Number of the best completed trial, or those of the Pareto front."""
        return best_numbers(self.study)

    @cached_property
    def feasible(self) -> NDArray[np.bool_]:
        """Which trials violate no constraint and have finite values, shape ``(n_trials,)``."""
        trials = self.study.get_trials(deepcopy=False)
        numbers = [t.number for t in trials if t.values and is_feasible(t)]
        found: NDArray[np.bool_] = np.isin(self.table["number"].to_numpy(), numbers)
        return found

    @cached_property
    def advice(self) -> list[Advice]:
        """What to know or to change, each with its figures, only where the data bear it out."""
        return advise(self)

    @cached_property
    def _numbers(self) -> frozenset[int]:
        return frozenset(int(number) for number in self.table["number"])

    def figures(self) -> dict[str, Any]:
        """Return plotly figures by name; see :mod:`optuna_quota.visualization`."""
        figures: dict[str, Any] = _below("visualization").figures(self)
        return figures

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML file.

        Args:
            path: Where to; an existing file is replaced.
        """
        _below("visualization").to_html(self, path)

    def publish(self, **options: Any) -> None:
        """Write notes and plots into the study for optuna-dashboard, in place of earlier ones.

        Args:
            options: Those of :func:`optuna_quota.dashboard.publish`.
        """
        _below("dashboard").publish(self.study, self, **options)

    def _repr_html_(self) -> str:
        html = getattr(_below("visualization"), "notebook_html", None)
        return str(html(self)) if html else f"<pre>{escape(self.summary())}</pre>"

    def summary(self) -> str:
        """Return the report as text for a terminal."""
        return summarize(self)

    def __repr__(self) -> str:
        return f"<UtilizationReport of {self.study.study_name!r}, {len(self.table)} trials>"

    def __str__(self) -> str:
        return self.summary()


def _below(module: str) -> Any:
    """Load a module that stands below this one: pictures draw reports, so they import it.

    This is the one place where a name is looked up downwards, and only when it is called.
    """
    return import_module(f"optuna_quota.{module}")


def analyze(study: Study, *, user_attrs: Sequence[str] = ()) -> UtilizationReport:
    """Return what drove the use of resources in a study.

    Example:

        .. code-block:: python

            report = analyze(study)
            print(report.summary())
            report.models["memory"].coefficients

    Args:
        study: Any Optuna study. One that ran without this library has its wall times alone.
        user_attrs: Names of trial user attributes to use beside the hyperparameters, such as the
            number of rows of the data.

    Raises:
        TypeError: If ``study`` is not an Optuna study or ``user_attrs`` is not a sequence of
            names.
    """
    from optuna.study import Study as OptunaStudy

    if not isinstance(study, OptunaStudy):
        raise TypeError(f"`study` must be an Optuna study but got {study!r}.")
    if isinstance(user_attrs, str) or not all(isinstance(name, str) for name in user_attrs):
        raise TypeError(f"`user_attrs` must be a sequence of names but got {user_attrs!r}.")
    return UtilizationReport(study, study_data(study, user_attrs))
