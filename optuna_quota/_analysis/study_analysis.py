"""The analysis of a study, each part computed on first use.

Formula and footprint are judged by leave-one-out errors on the log scale over the same trials: the
formula's residual over one minus its leverage, and the Gaussian process's exact ones. A formula is
called wrong where the footprint's errors are smaller by much, and by more than chance (Wilcoxon's
signed-rank test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
import re

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study

from optuna_quota import _records
from optuna_quota._analysis.advice import Advice, advise, StudyFacts
from optuna_quota._analysis.drivers import claims, correlations, cost_drivers, Driver
from optuna_quota._analysis.search_space_advice import (
    advise_search_space,
    cheaper_space,
    CheaperSpace,
    objective_model,
)
from optuna_quota._analysis.study_trials import StudyTrials
from optuna_quota._footprint.footprint import Footprint
from optuna_quota._footprint.observations import Observation, observation_of
from optuna_quota._footprint.resource_model import ResourceModel
from optuna_quota._resources import get_resource
from optuna_quota._table import DataFrame
from optuna_quota._utilization.data import cost_front, study_data
from optuna_quota._utilization.fit import derivatives_at, leverage, without_numeric_warnings
from optuna_quota._utilization.model import fit_utilization_models, UtilizationModel


_MIN_TRIALS = 8
_MUCH = 1.3
# A formula whose error is larger by less than this is good enough.
_MATTERS = 0.01
# So is one with a smaller error than this: with an exact meter, a footprint's error may be 0.5%,
# which no quota needs. Wrong formulas are detected as often (benchmarks/formula_checks.py).
_LEAST_ERROR = 0.04
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PredictionError:
    """Median leave-one-out errors, relative to the usage."""

    formula: float
    footprint: float
    n: int
    is_wrong: bool  # whether the formula is no law of this resource


def trials_of(source: Study | StudyAnalysis) -> StudyTrials:
    """Return the finished trials as of now, or as of an analysis."""
    return source._trials if isinstance(source, StudyAnalysis) else StudyTrials(source)


def shown_for(study: Study, analysis: StudyAnalysis) -> StudyAnalysis:
    """Return an analysis, maybe of a copy of the study, with the study's own ledger and limits."""
    if analysis.study is study:
        return analysis
    shown = copy(analysis)
    shown.study = study
    vars(shown).pop("_trials", None)
    return shown


def follows_law(analysis: StudyAnalysis, resource: str) -> bool:
    """Return whether a resource follows its formula, as far as the trials show."""
    error = analysis.prediction_errors.get(resource)
    return error is None or not error.is_wrong


class StudyAnalysis:
    """Correlations, models and advice of a study; :class:`UtilizationReport` shows them.

    Args:
        study: The study.
        user_attrs: Names of trial user attributes to analyze beside the hyperparameters.
    """

    def __init__(self, study: Study, user_attrs: Sequence[str] = ()) -> None:
        self.study = study
        self.data = study_data(study, user_attrs)
        attributes = study.user_attrs
        self.quota = _records.read_amounts(attributes.get(_records.STUDY_QUOTA))
        self.limits = _records.read_amounts(attributes.get(_records.STUDY_LIMITS))
        self._facts = StudyFacts(study, self.data, self.quota)

    @property
    def table(self) -> DataFrame:
        """The trial table of the finished trials, as :func:`trial_table` returns it."""
        return self.data.table

    @cached_property
    def correlations(self) -> DataFrame:
        """A row for each parameter and resource, the strongest of each resource first.

        The columns are ``param``, ``resource``, ``rho`` (Spearman's, or for a category the effect
        size ε² of Kruskal and Wallis, see ``measure``), ``lower`` and ``upper`` (95%),
        ``p_value``, ``p_adjusted`` (Holm, over all tests of the study), ``n``, ``measure`` and
        ``branch`` (the choices under which a conditional parameter is active).
        """
        partial = frozenset(name for name, model in self.models.items() if model.n_stopped_peaks)
        return correlations(replace(self.data, partial_peaks=partial))

    @property
    def models(self) -> dict[str, UtilizationModel]:
        """The fitted models by resource, each a floor plus a power law.

        Each has ``.coefficients`` (DataFrame indexed by term: ``estimate, lower, upper, p_value,
        kind, p_adjusted``), ``.formula``, ``.diagnostics`` (warnings) and ``.results``, the
        statsmodels results, whose attributes the model has too. They explain; to predict, use
        :attr:`footprint`. A resource without a model is in :attr:`missing_models`.
        """
        return self._fitted[0]

    @property
    def missing_models(self) -> dict[str, str]:
        """Why a resource has no model, by resource."""
        return self._fitted[1]

    @cached_property
    def _fitted(self) -> tuple[dict[str, UtilizationModel], dict[str, str]]:
        return fit_utilization_models(self.data)

    @cached_property
    def footprint(self) -> Footprint:
        """The footprint model, for ``QuotaSampler(footprint=…)`` of another study."""
        return Footprint.fit(list(self._observations.values()))

    @cached_property
    def _observations(self) -> dict[int, Observation]:
        found = zip(self.data.trials, self.data.records, strict=True)
        rows = {trial.number: observation_of(trial, record) for trial, record in found}
        return {number: row for number, row in rows.items() if row is not None}

    @cached_property
    def drivers(self) -> dict[str, tuple[Driver, ...]]:
        """Which hyperparameters drive each resource, the largest share of its variance first.

        Empty where parameters are conditional: they have no common range. A resource of which all
        trials used the same has no drivers.
        """
        if not self._observations or self.data.is_conditional:
            return {}
        best = self._observations.get(self.best[0]) if len(self.best) == 1 else None
        with without_numeric_warnings():
            found = cost_drivers(self.footprint, best.params if best else None)
        varied = (n for n in self.data.resources if self.table[n].nunique() > 1)
        return {name: found[name] for name in varied if name in found}

    @cached_property
    def prediction_errors(self) -> dict[str, PredictionError]:
        """Leave-one-out errors of formula and footprint, by resource."""
        from scipy.stats import wilcoxon

        found = {}
        for name, model in self.models.items():
            with without_numeric_warnings():
                ours = _formula_errors(model)
                theirs = _footprint_errors(self.footprint, name, self._observations)
                common = sorted(ours.keys() & theirs.keys())
                if len(common) < _MIN_TRIALS:
                    continue
                pairs = np.abs([[ours[i], theirs[i]] for i in common])
                formula, footprint = np.median(pairs, axis=0)
                is_wrong = bool(
                    formula > max(_MUCH * footprint, footprint + _MATTERS, _LEAST_ERROR)
                )
                if is_wrong:
                    test = wilcoxon(pairs[:, 0], pairs[:, 1], alternative="greater")
                    is_wrong = bool(test.pvalue < _SIGNIFICANCE)
                one, other = np.expm1(np.minimum((formula, footprint), 20.0)).tolist()
                found[name] = PredictionError(one, other, len(common), is_wrong)
        return found

    @property
    def formulas(self) -> dict[str, str]:
        """The formula of each resource, or a sentence that it follows no power law."""
        return {
            name: model.formula if follows_law(self, name) else self._no_law(name)
            for name, model in self.models.items()
        }

    def _no_law(self, resource: str) -> str:
        error = self.prediction_errors[resource]
        return (
            f"{resource} follows no floor plus power law: the leave-one-out error of the formula "
            f"is {error.formula:.1%}, that of the footprint {error.footprint:.1%}. Use "
            "`report.footprint.predict(params)`."
        )

    def model_warnings(self, resource: str) -> list[str]:
        """Return the warnings about a formula; none if it is not shown."""
        model = self.models[resource]
        if not follows_law(self, resource):
            return []
        correlated = [r["param"] for r in claims(self.correlations) if r["resource"] == resource]
        left_out = [
            p for p in correlated if not re.search(rf"(?<!\w){re.escape(p)}(?!\w)", model.formula)
        ]
        title = get_resource(resource).title
        if left_out and not model.has_clear_term:
            verb = "correlates" if len(left_out) == 1 else "correlate"
            unclear = (
                f"{', '.join(left_out)} {verb} with the {title}, but which term has the effect is "
                "not clear yet: run more trials, or use `report.footprint.predict(params)`."
            )
            return [*model.diagnostics, unclear]
        omitted = (
            f"{param} correlates with the {title} too, but has no significant effect beside the "
            "other terms, so the formula omits it."
            for param in left_out
        )
        return [*model.diagnostics, *omitted]

    @cached_property
    def _trials(self) -> StudyTrials:
        return StudyTrials(self.study, (self.data.trials, self.data.records))

    @property
    def best(self) -> list[int]:
        """Number of the best completed trial, or those of the Pareto front."""
        return self._facts.best

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Which trials violate no constraint and have finite values, shape ``(n_trials,)``."""
        return self._facts.feasible

    @cached_property
    def cheaper_space(self) -> CheaperSpace | None:
        """Two bounds that would halve the cost of a trial and keep the best point, if any do."""
        facts = self._facts
        numbers = self.table["number"][facts.near_best]
        near = [self._observations[n].params for n in numbers if n in self._observations]
        if facts.cost is None or not near:
            return None
        with without_numeric_warnings():
            return cheaper_space(self.footprint, self._objective, facts.cost, self.limits, near)

    @cached_property
    def front(self) -> DataFrame | None:
        """The completed trials on the Pareto front of cost and value, cheapest first.

        The columns are ``number``, ``value`` and the cost: a total of the quota, or else a time.
        None for several objectives, or where the cost of fewer than ten trials is known.
        """
        facts = self._facts
        if facts.cost is None or facts.values is None:
            return None
        columns = ["number", "value", facts.cost]
        found = self.table.loc[facts.completed & facts.feasible, columns].dropna()
        _, values, costs = found.to_numpy(dtype=float).T
        front = found.iloc[cost_front(costs, facts.sign * values)]
        table: DataFrame = front.reset_index(drop=True)
        return table

    @cached_property
    def advice(self) -> list[Advice]:
        """What to change, with the figures behind it; only what the data support."""
        edits = advise_search_space(self._facts, self.footprint, lambda: self._objective)
        return [*edits, *advise(self._facts)]

    @cached_property
    def _objective(self) -> ResourceModel | None:
        with without_numeric_warnings():
            return objective_model(self._facts, self.footprint)


def _formula_errors(model: UtilizationModel) -> dict[int, float]:
    fit, sample = model.selected.fit, model.selected.sample
    at_fit = derivatives_at(fit, sample)
    errors = (sample.y - at_fit.mean) / np.maximum(1 - leverage(at_fit), 0.05)
    rows = zip(model.numbers, errors, sample.censored, strict=True)
    return {int(number): float(error) for number, error, cut in rows if not cut}


def _footprint_errors(
    footprint: Footprint, resource: str, numbers: Mapping[int, Observation]
) -> dict[int, float]:
    model = footprint.contents.models.get(resource)
    if model is None:
        return {}
    number_of = {id(row): number for number, row in numbers.items()}
    rows = [row for row in footprint.contents.observations if row.usage.get(resource) is not None]
    errors, censored = model.log_leave_one_out()[0], model.censored
    if len(rows) != len(errors):
        return {}
    return {
        number_of[id(row)]: float(error)
        for row, error, cut in zip(rows, errors, censored, strict=True)
        if not cut
    }
