"""What a layer is like: dead channels, noise, magnitudes, finite or not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnkit.metrics.base import Float64Metric, PooledMetric, first, unpack
from bnkit.moments import Moments, to_float64
from bnkit.shift import EPS, affine_magnitude, all_finite, batch_noise, dead_channels

__all__ = ["AffineMagnitude", "AllFinite", "BatchNoise", "DeadChannels"]


class DeadChannels(PooledMetric):
    r"""Which channels carry nothing on: 1 where one is dead, 0 where not, so the mean is their fraction.

    $$
    |\gamma| \sqrt{\frac{\sigma^2}{\sigma^2 + \epsilon}} < t \quad\text{or}\quad 1 - \Phi(-\beta / |\gamma|) < t
    $$

    Source: see [`bnkit.shift.dead_channels`][].

    Args:
        num_channels: C.
        eps: the layer's eps.
        threshold: t, > 0.
        kwargs: torchmetrics' own.

    Examples:
        >>> metric = DeadChannels(2)
        >>> metric.update(Moments(8, torch.zeros(2), torch.tensor([1.0, 0.0])), torch.ones(2), torch.zeros(2))
        >>> metric.compute()
        tensor([0., 1.], dtype=torch.float64)
    """

    affine: Tensor  # (3, C): whether there is one, weight, bias

    def __init__(self, num_channels: int, eps: float = EPS, threshold: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(num_channels, eps, **kwargs)
        if not threshold > 0:
            raise ValueError(f"threshold is a fraction above 0, not {threshold!r}.")
        self.threshold = threshold
        self.add_state("affine", torch.zeros(3, num_channels, dtype=torch.float64), dist_reduce_fx=first)

    def update(self, observed: Moments, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Pool what was observed, and keep the layer's weight and bias, each of shape (C,); None where it has none."""
        super().update(observed)
        one = torch.ones(self.num_channels, dtype=torch.float64, device=self.affine.device)
        weight = one if weight is None else to_float64(weight).to(one.device)
        bias = torch.zeros_like(one) if bias is None else to_float64(bias).to(one.device)
        self.affine = torch.stack([one, weight, bias])

    def compute(self) -> Tensor:
        """1, 0 or NaN for each channel, shape (C,), float64."""
        _, weight, bias = self.affine
        dead = self._known(dead_channels(unpack(self.observed), weight, bias, self.eps, self.threshold))
        return dead.masked_fill((self.observed[2] + weight + bias).isnan(), math.nan)


class BatchNoise(PooledMetric):
    r"""How much one batch's mean scatters, in standard deviations of the activation; >= 0, infinite for one batch.

    $$\sqrt{\frac{\sum_b n_b (\mu_b - \mu)^2}{(B - 1)\,(n / B)\,(\sigma^2 + \epsilon)}}$$

    Every update should be of one batch, or of Moments pooled from batches.

    Source: the between-batch mean square of a one-way analysis of variance; see [`bnkit.shift.batch_noise`][].

    Examples:
        >>> metric = BatchNoise(1, eps=0)
        >>> for mean in (-1.0, 1.0):
        ...     metric.update(Moments(4, torch.tensor([mean]), torch.ones(1)))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The noise, shape (C,), float64."""
        return self._known(batch_noise(unpack(self.observed), self.eps))


class AllFinite(Float64Metric):
    """Whether all means and variances observed were finite: 1, or 0 if one was NaN or infinite.

    Source: see [`bnkit.shift.all_finite`][].

    Examples:
        >>> metric = AllFinite()
        >>> metric.update(Moments(2, torch.tensor([float("nan")]), torch.ones(1)))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    updates: Tensor  # (2,): all, those that were not finite

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("updates", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, observed: Moments) -> None:
        """Look at what was observed, of any layer; Moments with a count of 0 are no update."""
        if bool((observed.count > 0).any()):
            self.updates = self.updates + self.updates.new_tensor([1.0, not all_finite(observed)])

    def compute(self) -> Tensor:
        """1 or 0, float64, without a dimension."""
        number, bad = self.updates
        finite: Tensor = (bad == 0).to(torch.float64)
        return finite.masked_fill(number == 0, math.nan)


class AffineMagnitude(Float64Metric):
    r"""Root mean square of the last $\gamma$ and $\beta$ over the channels; >= 0.

    Of several ranks the lowest one's with an update counts.

    Source: see [`bnkit.shift.affine_magnitude`][].

    Examples:
        >>> metric = AffineMagnitude()
        >>> metric.update(torch.ones(4) * 2, None)
        >>> metric.compute()["weight"]
        tensor(2., dtype=torch.float64)
    """

    magnitudes: Tensor  # (3, 1): whether there are any, weight, bias

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("magnitudes", torch.zeros(3, 1, dtype=torch.float64), dist_reduce_fx=first)

    def update(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Keep the magnitudes of a layer's weight and bias, each of shape (C,); None where it has none."""
        self.magnitudes = self.magnitudes.new_tensor([[1.0], *([value] for value in affine_magnitude(weight, bias))])

    def compute(self) -> dict[str, Tensor]:
        """``weight`` and ``bias``, each float64 without a dimension."""
        known, weight, bias = self.magnitudes[:, 0]
        return {"weight": weight.masked_fill(known == 0, math.nan), "bias": bias.masked_fill(known == 0, math.nan)}
