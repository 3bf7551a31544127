"""Batch renormalization: the batch's estimate, corrected towards the population's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.base import Variant, batch_statistics
from bnkit.norms.spec import Context, Spec

__all__ = ["Renorm", "RenormBatchNorm1d", "RenormBatchNorm2d", "RenormBatchNorm3d"]

STEP = "_renorm_step"


class _Renorm(Variant):
    """Corrects the batch's statistics towards the running ones; see [`bnkit.norms.Renorm`][]."""

    trains_by_statistics = True

    @property
    def step(self) -> int:
        """Training forwards so far: the position in the schedule. Not in the state_dict; a callback keeps it."""
        return int(self._schedule.item())

    @step.setter
    def step(self, value: int) -> None:
        self._schedule.fill_(value)

    @property
    def _schedule(self) -> Tensor:
        buffer = self._buffers[STEP]
        if buffer is None:
            raise RuntimeError("The layer has lost its place in Renorm's schedule.")
        return buffer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Batch renormalization in training mode; BatchNorm's inference otherwise."""
        if not self.training:
            return super().forward(input)
        self._check_shape(input)
        mean, var, count = batch_statistics(input)
        scale, shift = self._correction(mean, var)
        # gamma * (x_hat * r + d) + beta is BatchNorm with gamma * r and beta + gamma * d: one fused kernel.
        weight = scale if self.weight is None else self.weight * scale
        bias = shift if self.weight is None else self.weight * shift
        bias = bias if self.bias is None else bias + self.bias
        output = F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
        self._schedule.add_(1)
        if count:
            self._update_running(mean, var * (count / (count - 1)))
        return output

    def _correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The corrections r and d, each of shape (C,), in the running buffers' dtype and without a graph."""
        running_mean, running_var = self.running_mean, self.running_var
        if running_mean is None or running_var is None:
            raise RuntimeError("Renorm works by running statistics, and the layer has lost its own.")
        spec: Renorm = self.spec
        with torch.no_grad():
            done = (self._schedule.to(mean.dtype) / max(spec.warmup_steps, 1)).clamp(max=1)
            done = done if spec.warmup_steps else torch.ones_like(done)
            r_max, d_max = 1 + (spec.r_max - 1) * done, spec.d_max * done
            sigma = (running_var.to(mean.dtype) + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / sigma).clamp(1 / r_max, r_max)
            d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
            return r.to(running_var.dtype), d.to(running_var.dtype)


class RenormBatchNorm1d(_Renorm, nn.BatchNorm1d):
    """Batch renormalization over (N, C) or (N, C, L); see [`bnkit.norms.Renorm`][]."""


class RenormBatchNorm2d(_Renorm, nn.BatchNorm2d):
    """Batch renormalization over (N, C, H, W); see [`bnkit.norms.Renorm`][]."""


class RenormBatchNorm3d(_Renorm, nn.BatchNorm3d):
    """Batch renormalization over (N, C, D, H, W); see [`bnkit.norms.Renorm`][]."""


@dataclass(frozen=True)
class Renorm(Spec):
    r"""Batch normalization whose output is, within bounds, what inference would give.

    $$
    y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta,\quad
    r = \mathrm{clip}_{[1/r_{max}, r_{max}]}\left(\frac{\sigma_B}{\sigma}\right),\quad
    d = \mathrm{clip}_{[-d_{max}, d_{max}]}\left(\frac{\mu_B - \mu}{\sigma}\right)
    $$

    with $\mu$ and $\sigma = \sqrt{running\_var + \epsilon}$ the running statistics before this batch, and
    no gradient through r and d. Where neither is clipped, y is BatchNorm's inference.

    Warning:
        The running statistics take part in training, so whatever changes them (recalibration, another momentum) changes
        training too. Ioffe keeps a running sigma; here it is the root of ``running_var``, so that a checkpoint is
        BatchNorm's.

    Training: as above; the bounds grow linearly over the first ``warmup_steps`` forwards, r's from 1 and d's from 0, so
    training begins as plain BatchNorm. One step of the running statistics a forward, by BatchNorm's rule.

    Inference: BatchNorm's own.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    NeurIPS 2017, section 3, algorithm 1 (which relaxes r_max from 1 to 3 and d_max from 0 to 5).

    Args:
        r_max: largest correction of the scale once warm, at least 1.
        d_max: largest correction of the shift once warm, in standard deviations, at least 0.
        warmup_steps: training forwards of the layer until the bounds have grown to these.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 10_000

    layers = (RenormBatchNorm1d, RenormBatchNorm2d, RenormBatchNorm3d)
    needs_running_statistics = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.r_max) or self.r_max < 1:
            raise ValueError(f"Renorm's r_max is a factor of at least 1, not {self.r_max!r}.")
        if not math.isfinite(self.d_max) or self.d_max < 0:
            raise ValueError(f"Renorm's d_max is a number of standard deviations, at least 0, not {self.d_max!r}.")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"Renorm's warmup_steps is an int of at least 0, not {self.warmup_steps!r}.")

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """Add the schedule's position: a tensor, so that a compiled layer is not compiled again for each step."""
        device = None if layer.running_var is None else layer.running_var.device
        layer.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        return {}

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:  # noqa: ARG002
        """Take the schedule's position away."""
        del layer._buffers[STEP]
        layer._non_persistent_buffers_set.discard(STEP)
