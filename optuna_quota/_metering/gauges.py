"""What is measured of every trial beside its process tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna_quota._metering.energy import ProcessorEnergyGauge
from optuna_quota._metering.gauge import Gauge
from optuna_quota._metering.gpu_gauge import GpuGauge


if TYPE_CHECKING:
    from optuna_quota._metering.watch import Watch


def open_gauges(watch: Watch) -> Sequence[Gauge]:
    """Return the gauges of a trial: GPUs, and the processors' energy."""
    asked = {*watch.limits.amounts(), *watch.left}
    energy = ProcessorEnergyGauge(lambda: watch.usage().cpu_time, is_asked="energy" in asked)
    return (GpuGauge(asked, watch.environment), energy)
