"""What a study is about to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import TYPE_CHECKING

from optuna_quota import _units


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Strategy:
    """What a study is about to do.

    Example:

        .. code-block:: python

            strategy = Strategy(n_trials=200, n_jobs=2)

    Args:
        n_trials: Trials to run.
        n_jobs: Trials that run at once, over all workers.
        search_space: Distribution of each hyperparameter. Without it, the points of the strategy
            are those that the footprint or the finished trials know.

    Raises:
        ValueError: If a count is not a positive whole number.
        TypeError: If a count is not a number or the search space not a mapping of distributions.
    """

    n_trials: int
    n_jobs: int = field(default=1, kw_only=True)
    search_space: Mapping[str, BaseDistribution] | None = field(
        default=None, kw_only=True, hash=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_trials", _units.parse_count(self.n_trials, "n_trials"))
        object.__setattr__(self, "n_jobs", _units.parse_count(self.n_jobs, "n_jobs"))
        if self.search_space is not None:
            object.__setattr__(self, "search_space", _search_space(self.search_space))


def _search_space(space: Any) -> dict[str, BaseDistribution]:
    from optuna.distributions import BaseDistribution

    if not isinstance(space, Mapping):
        raise TypeError(
            f"`search_space` must be a mapping of names to distributions but got {space!r}."
        )
    for name, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"`search_space[{name!r}]` must be an Optuna distribution "
                f"but got {distribution!r}."
            )
    return dict(space)
