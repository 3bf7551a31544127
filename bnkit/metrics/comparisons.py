"""What was observed against a reference, per channel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from bnkit.metrics.base import ComparisonMetric, unpack
from bnkit.moments import Moments
from bnkit.shift import EPS, kl_divergence, log_variance_ratio, mean_shift, psi, shift, wasserstein2

__all__ = ["KLDivergence", "LogVarianceRatio", "MeanShift", "PopulationStabilityIndex", "Wasserstein2"]


class MeanShift(ComparisonMetric):
    r"""How far the mean is off, in standard deviations of the reference; any sign, 0 where equal.

    $$z = \frac{\mu_o - \mu_r}{\sqrt{\sigma_r^2 + \epsilon}}$$

    Source: see [`bnkit.shift.mean_shift`][].

    Examples:
        >>> metric = MeanShift(1, eps=0)
        >>> metric.update(Moments(8, torch.tensor([3.0]), torch.ones(1)), Moments(8, torch.ones(1), torch.ones(1)))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    _measure = staticmethod(mean_shift)


class LogVarianceRatio(ComparisonMetric):
    r"""Logarithm of the ratio of the variances; any sign, 0 where equal.

    $$\ln r = \ln\frac{\sigma_o^2 + \epsilon}{\sigma_r^2 + \epsilon}$$

    Source: see [`bnkit.shift.log_variance_ratio`][].

    Examples:
        >>> metric = LogVarianceRatio(1, eps=0)
        >>> metric.update(Moments(8, torch.ones(1), torch.ones(1) * 2), Moments(8, torch.ones(1), torch.ones(1)))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    _measure = staticmethod(log_variance_ratio)


class KLDivergence(ComparisonMetric):
    r"""Kullback-Leibler divergence of the observed normal distribution from the reference's; in nats, >= 0.

    $$KL = \tfrac12 (z^2 + r - 1 - \ln r)$$

    Source: see [`bnkit.shift.kl_divergence`][].

    Examples:
        >>> metric = KLDivergence(1, eps=0)
        >>> metric.update(Moments(8, torch.tensor([3.0]), torch.ones(1)), Moments(8, torch.ones(1), torch.ones(1)))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    _measure = staticmethod(kl_divergence)


class PopulationStabilityIndex(ComparisonMetric):
    r"""Population stability index, the symmetric divergence of the two normal distributions; >= 0.

    $$PSI = KL(o \| r) + KL(r \| o)$$

    Source: see [`bnkit.shift.psi`][].

    Examples:
        >>> metric = PopulationStabilityIndex(1, eps=0)
        >>> metric.update(Moments(8, torch.tensor([3.0]), torch.ones(1)), Moments(8, torch.ones(1), torch.ones(1)))
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    _measure = staticmethod(psi)


class Wasserstein2(ComparisonMetric):
    r"""2-Wasserstein distance of the two normal distributions; >= 0, in the activation's own unit.

    $$W_2 = \sqrt{(\mu_o - \mu_r)^2 + (\sigma_o - \sigma_r)^2}$$

    Source: see [`bnkit.shift.wasserstein2`][].

    Args:
        num_channels: C.
        eps: the layer's eps; used where ``standardized``.
        standardized: in standard deviations of the reference, which can be compared across layers.
        kwargs: torchmetrics' own.

    Examples:
        >>> metric = Wasserstein2(1)
        >>> metric.update(Moments(8, torch.ones(1) * 3, torch.ones(1) * 25), Moments(8, torch.zeros(1), torch.ones(1)))
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    def __init__(self, num_channels: int, eps: float = EPS, standardized: bool = False, **kwargs: Any) -> None:
        super().__init__(num_channels, eps, **kwargs)
        self.standardized = standardized

    def compute(self) -> Tensor:
        """The distance, shape (C,), float64."""
        observed, reference = unpack(self.observed), Moments(*self.reference)
        if self.standardized:
            values = shift(observed, reference, self.eps).wasserstein2
        else:
            values = wasserstein2(observed, reference)
        return self._known(values).masked_fill(self.reference[0] == 0, math.nan)
