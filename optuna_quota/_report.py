"""``analyze``, and the report that it returns: summary, figures, HTML, dashboard."""

from __future__ import annotations

from collections.abc import Sequence
import logging
import os
from typing import Any

from optuna.study import Study

from optuna_quota._analysis.study_analysis import StudyAnalysis
from optuna_quota._table import check_study


_logger = logging.getLogger("optuna.quota.dashboard")


class UtilizationReport(StudyAnalysis):
    """What drove resource usage in a study, as of the call of :func:`analyze`.

    Each part is computed on first use and kept.

    Example:

        .. code-block:: python

            report = analyze(study)
            print(report.summary())
            report.to_html("report.html")

    Attributes:
        study: The study.
        data: Its finished trials as arrays.
        quota: The study's quota by resource, in SI base units, from its attributes.
        limits: Its limits likewise.
    """

    def figures(self) -> dict[str, Any]:
        """Return plotly figures by name; see :mod:`optuna_quota.visualization`.

        Raises:
            ImportError: If plotly is not installed.
        """
        from optuna_quota import visualization

        return visualization.figures(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML file.

        Without plotly, the file has tables but no figures.

        Args:
            path: The file; an existing one is replaced.
        """
        from optuna_quota import visualization

        visualization.to_html(self, path)

    def publish(self, **options: Any) -> None:
        """Write notes and plots into the study for optuna-dashboard, replacing earlier ones.

        Without plotly, the notes alone are written; without optuna-dashboard, nothing. A warning
        in the log says what to install.

        Args:
            options: Those of :func:`optuna_quota.dashboard.publish`.
        """
        from optuna_quota import dashboard

        try:
            dashboard.publish(self.study, self, **options)
        except ImportError as error:
            _logger.warning(f"Nothing was published. {error}")

    def _repr_html_(self) -> str:
        from optuna_quota import visualization

        return visualization.notebook_html(self)

    def summary(self) -> str:
        """Return the report as text for a terminal."""
        from optuna_quota.visualization._report_text import ReportText

        return ReportText(self).summary()

    def __repr__(self) -> str:
        return f"<UtilizationReport of {self.study.study_name!r}, {len(self.table)} trials>"

    __str__ = summary


def analyze(study: Study, *, user_attrs: Sequence[str] = ()) -> UtilizationReport:
    """Analyze what drove resource usage in a study.

    Example:

        .. code-block:: python

            report = analyze(study)
            print(report.summary())
            report.models["memory"].coefficients

    Args:
        study: Any Optuna study. One that ran without this library has wall times only.
        user_attrs: Names of trial user attributes to analyze beside the hyperparameters, such as
            the number of rows of the data.

    Raises:
        TypeError: If ``study`` is not an Optuna study or ``user_attrs`` is not a sequence of
            names.
        ValueError: If a user attribute has the name of a hyperparameter.
    """
    check_study(study)
    if isinstance(user_attrs, str) or not all(isinstance(name, str) for name in user_attrs):
        raise TypeError(f"`user_attrs` must be a sequence of names but got {user_attrs!r}.")
    return UtilizationReport(study, user_attrs)
