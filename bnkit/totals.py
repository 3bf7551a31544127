"""The running totals of a pass over the data: what recalibration has pooled."""

from __future__ import annotations

import torch
from torch import Tensor

from bnkit.moments import Moments

__all__ = ["Totals"]


class Totals:
    """Moments of several layers one after the other, to which batches are added in place.

    Args:
        channels: of all layers together, C.
    """

    def __init__(self, channels: int) -> None:
        # Values, batches, mean, and the sums of squared deviations within and between the batches.
        self._rows = torch.zeros(5, channels, dtype=torch.float64)

    @property
    def pooled(self) -> Moments:
        """All batches so far; see [`bnkit.Moments.cat`][bnkit.Moments.cat]."""
        count, batches, mean, within, between = self._rows.clone()
        return Moments(count, mean, (within + between) / count.clamp_min(1), batches, between)

    def add(self, statistics: Tensor, columns: Tensor) -> None:
        """Add a batch, by the law of total variance (Chan, Golub & LeVeque 1983).

        Args:
            statistics: means and variances, shape (2, C); 0 where there are no values.
            columns: values, share of a batch that they are, and the variances' factor to sums of squared deviations,
                shape (3, C).
        """
        (batch_mean, batch_var), (values, share, degrees) = statistics, columns
        count, batches, mean, within, between = self._rows
        deviation = batch_mean - mean
        weight = values / (count + values).clamp_min(1)  # there may be no values at all yet
        within.addcmul_(batch_var.clamp_min(0), degrees)
        mean.addcmul_(deviation, weight)
        between.addcmul_(deviation.square_(), weight.mul_(count))
        count += values
        batches += share
