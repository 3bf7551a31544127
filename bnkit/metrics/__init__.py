r"""The measures of [`bnkit.shift`][] and [`bnkit.probes`][] as ``torchmetrics.Metric``, each with its reduction.

What is observed is pooled without loss over updates and over ranks (the law of total variance), so on n ranks a metric
is what it would be in one process that saw all data. A rank without an update changes nothing.

Unknown is NaN, never 0: before the first update, and where what was observed is not finite. A state is float64 whatever
the metric is cast to. A result of one element has no dimension, as torchmetrics has it.

In a ``MetricCollection`` give the arguments by keyword: each metric takes those that it knows.
"""

from bnkit.metrics.comparisons import (
    KLDivergence,
    LogVarianceRatio,
    MeanShift,
    PopulationStabilityIndex,
    Wasserstein2,
)
from bnkit.metrics.layers import AffineMagnitude, AllFinite, BatchNoise, DeadChannels
from bnkit.metrics.probes import InternalCovariateShift, TrainEvalGap

__all__ = [
    "AffineMagnitude",
    "AllFinite",
    "BatchNoise",
    "DeadChannels",
    "InternalCovariateShift",
    "KLDivergence",
    "LogVarianceRatio",
    "MeanShift",
    "PopulationStabilityIndex",
    "TrainEvalGap",
    "Wasserstein2",
]
