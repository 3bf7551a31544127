"""What probes found, averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bnkit.metrics.base import Float64Metric
from bnkit.probes import CovariateShift, GapReport

__all__ = ["InternalCovariateShift", "TrainEvalGap"]


class TrainEvalGap(Float64Metric):
    """The numbers of [`bnkit.probes.train_eval_gap`][], averaged over samples; NaN where none was known.

    Loss and its difference have any sign, ``disagreement`` is from 0 to 1, ``output`` is >= 0; see
    [`bnkit.probes.GapReport`][].

    Examples:
        >>> from bnkit.probes import train_eval_gap
        >>> metric, model = TrainEvalGap(), torch.nn.BatchNorm1d(2, momentum=1.0)
        >>> metric.update(train_eval_gap(model, torch.ones(8, 2)))
        >>> metric.compute()["disagreement"]
        tensor(0., dtype=torch.float64)
    """

    QUANTITIES: ClassVar = ("loss", "loss_batch", "loss_running", "disagreement", "output")
    totals: Tensor  # (2, 5): of value times samples, of samples

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("totals", torch.zeros(2, len(self.QUANTITIES), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, report: GapReport, samples: float | None = None) -> None:
        """Add a probe's result.

        Args:
            report: what the probe returned.
            samples: its weight. Default: the samples in its batch.
        """
        weight = report.samples if samples is None else samples
        if not weight >= 0:
            raise ValueError(f"samples is a number of samples, at least 0, not {weight!r}.")
        values = [getattr(report, name) for name in self.QUANTITIES]
        rows = [[0.0 if v is None else v * weight for v in values], [0.0 if v is None else weight for v in values]]
        self.totals = self.totals + self.totals.new_tensor(rows)

    def compute(self) -> dict[str, Tensor]:
        """Each quantity by name, float64 without a dimension."""
        return dict(zip(self.QUANTITIES, self.totals[0] / self.totals[1], strict=True))


class InternalCovariateShift(Float64Metric):
    r"""Internal covariate shift of each layer, averaged over probes; a layer never probed is NaN.

    $$\|G - G'\|_2 \ge 0, \qquad \cos(G, G') \in [-1, 1]$$

    Source: Santurkar et al. 2018; see [`bnkit.probes.internal_covariate_shift`][].

    Args:
        layers: names of the layers, in the order of the result.
        kwargs: torchmetrics' own.

    Examples:
        >>> metric = InternalCovariateShift(["bn1", "bn2"])
        >>> metric.update({"bn1": CovariateShift(0.0, 1.0), "bn2": CovariateShift(0.5, 0.5)})
        >>> metric.compute()["norm"]
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """

    totals: Tensor  # (2, 2, L): sum and number, of norm and cosine

    def __init__(self, layers: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = tuple(layers)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be names of one layer or more, each once, not {list(layers)}.")
        self.add_state("totals", torch.zeros(2, 2, len(self.layers), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, shifts: Mapping[str, CovariateShift]) -> None:
        """Add a probe's result, of all layers or of some; a cosine that is NaN (a gradient of 0) is left out."""
        unknown = sorted(set(shifts) - set(self.layers))
        if unknown:
            raise ValueError(f"The metric was made for the layers {list(self.layers)}, not for {unknown}.")
        absent = CovariateShift(math.nan, math.nan)
        rows = self.totals.new_tensor([shifts.get(name, absent) for name in self.layers]).T
        self.totals = self.totals + torch.stack([rows.nan_to_num(nan=0.0, posinf=math.inf), (~rows.isnan()).double()])

    def compute(self) -> dict[str, Tensor]:
        """``norm`` and ``cosine``, each of shape (L,), float64, in the order of ``layers``."""
        norm, cosine = self.totals[0] / self.totals[1]
        return {"norm": norm, "cosine": cosine}
