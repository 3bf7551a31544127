"""Synchronized batches: the exact estimator over a scope wider than the device's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms import process_groups
from bnkit.norms.base import (
    Scoped,
    accumulation_dtype,
    batch_statistics,
    gradient_sums,
    normalize_by,
    per_channel,
    uncompiled,
)
from bnkit.norms.spec import Context, Spec

__all__ = ["Sync", "SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d", "pool_running_statistics"]


class _Sync(Scoped):
    """Normalises by the statistics of a group of ranks; see [`bnkit.norms.Sync`][]."""

    waits_for_ranks = True

    def _is_device_batch(self, input: Tensor) -> bool:  # noqa: A002, ARG002
        return self.spec.group_size == 1 or not process_groups.is_distributed()

    @uncompiled
    def _normalize(self, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # noqa: A002
        group = process_groups.subgroup(self.spec.group_size)
        if group is None:
            raise RuntimeError("The process group was destroyed during the forward.")
        if input.is_cuda and "nccl" in dist.get_backend(group):
            return _torch_synchronized(input, self.weight, self.bias, self.eps, group)
        result = _Synchronized.apply(input, self.weight, self.bias, self.eps, group)  # type: ignore[no-untyped-call]
        output, mean, unbiased_var, total = result
        return (output, mean, unbiased_var) if total.item() else (output, None, None)


class SyncBatchNorm1d(_Sync, nn.BatchNorm1d):
    """Synchronized batch normalization over (N, C) or (N, C, L); see [`bnkit.norms.Sync`][]."""


class SyncBatchNorm2d(_Sync, nn.BatchNorm2d):
    """Synchronized batch normalization over (N, C, H, W); see [`bnkit.norms.Sync`][]."""


class SyncBatchNorm3d(_Sync, nn.BatchNorm3d):
    """Synchronized batch normalization over (N, C, D, H, W); see [`bnkit.norms.Sync`][]."""


@dataclass(frozen=True)
class Sync(Spec):
    r"""Batch normalization over the batches of all ranks, or of groups of ``group_size`` consecutive ranks.

    $$y = \gamma \frac{x - \mu_G}{\sqrt{\sigma_G^2 + \epsilon}} + \beta$$

    with mean and variance of all values on the group's ranks, pooled from each rank's count, mean and sum of squared
    deviations. Batches may differ in size, and a rank's batch may be empty.

    Warning:
        Every rank of a group must call the layer as often and in the same order, or the ranks wait for each other for
        ever. Sub-groups come to hold different running statistics, of which DistributedDataParallel keeps rank 0's:
        call [`bnkit.norms.pool_running_statistics`][] before evaluating and before saving.

    Training: one collective forward (2C + 1 numbers a rank), one backward (2C numbers). Gradients of weight and bias
    are the rank's own, as DistributedDataParallel expects; their sum over the ranks is that of one process with the
    concatenated batch. On CUDA with NCCL, torch's own synchronized kernels do the work. Where there is one process,
    the layer is plain BatchNorm. Under ``torch.compile`` the graph breaks at the collective.

    Inference: BatchNorm's own, without any communication.

    Source: Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018 (cross-GPU batch normalization);
    groups as in Wu, Johnson,
    "Rethinking 'Batch' in BatchNorm", 2021, section 4.

    Args:
        group_size: ranks a group, a divisor of the number of ranks; None: all ranks.
    """

    group_size: int | None = None

    layers = (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"Sync's group_size is a number of ranks, an int of at least 1, or None, not {size!r}.")

    def check(self, layer: _BatchNorm, context: Context) -> None:
        """Refuse, beside the usual, a world that cannot be cut into such groups; then make them."""
        super().check(layer, context)
        if self.group_size and context.world_size > 1 and context.world_size % self.group_size:
            raise ValueError(
                f"{context.world_size} ranks cannot be cut into groups of {self.group_size}: "
                f"choose a divisor of {context.world_size}."
            )
        process_groups.subgroup(self.group_size)  # made while all ranks are here; the layer looks them up at each call


class _Synchronized(Function):
    """Batch normalization over the values of all ranks in a group, with its exact gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output; mean and unbiased variance of the group's values; their number."""
        local_mean, local_var, count = batch_statistics(x)
        counted = torch.full((1,), count, dtype=torch.float64, device=x.device)
        rows = process_groups.gather(torch.cat((counted, local_mean.double(), local_var.double() * count)), group)
        counts, means, squares = torch.split(rows, [1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        if total == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, over all ranks got {total:.0f}.")
        mean = (counts * means).sum(0) / total.clamp(min=1)
        deviations = squares.sum(0) + (counts * (means - mean).square()).sum(0)
        unbiased_var = (deviations / (total - 1)).to(local_mean.dtype)
        mean, var = mean.to(local_mean.dtype), (deviations / total.clamp(min=1)).to(local_mean.dtype)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, unbiased_var, total)
        return normalize_by(x, mean, var, weight, bias, eps), mean, unbiased_var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of x over the whole group, of weight and bias over this rank's values."""
        x, weight, mean, var, total = ctx.saved_tensors
        scaled, plain = gradient_sums(grad, x, mean, var, ctx.eps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = process_groups.reduce_sum(torch.cat((scaled, plain)).double(), ctx.group)
            mean_scaled, mean_plain = (sums / total.clamp(min=1)).to(mean.dtype).chunk(2)
            inverse = (var + ctx.eps).rsqrt()
            factor = inverse if weight is None else inverse * weight
            # factor * (grad - mean_plain - mean_scaled * (x - mean) * inverse) in two passes; what is taken off grad is
            # itself a normalization of x.
            wide = x.to(accumulation_dtype(x))
            taken_off = normalize_by(wide, mean, var, -factor * mean_scaled, -factor * mean_plain, ctx.eps)
            grad_x = taken_off.addcmul_(grad, per_channel(factor.to(wide.dtype), x)).to(x.dtype)
        grad_weight = scaled.to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = plain.to(weight.dtype if weight is not None else plain.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


def _torch_synchronized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's fused CUDA kernels. Momentum 1 leaves the batch's own statistics in the two buffers it is given."""
    from torch.nn.modules._functions import SyncBatchNorm

    dtype = torch.float32 if weight is None else weight.dtype
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device).unbind()
    size = dist.get_world_size(group)
    output = SyncBatchNorm.apply(x, weight, bias, mean, var, eps, 1.0, group, size)  # type: ignore[no-untyped-call]
    return output, mean, var


def pool_running_statistics(model: nn.Module) -> int:
    """Give all ranks the running statistics of all sub-groups, pooled by the law of total variance, in place.

    Every rank must call it, and all with the same model. Ranks count alike, and a model without sub-groups is left
    as it is, so calling it once too often costs nothing.

    Returns:
        How many layers were pooled.
    """
    if not process_groups.is_distributed():
        return 0
    world = process_groups.subgroup(None)
    layers = [m for m in model.modules() if isinstance(m, _Sync) and m.spec.group_size and m.running_var is not None]
    pairs = [(m.running_mean, m.running_var) for m in layers if m.spec.group_size < dist.get_world_size()]
    buffers = [buffer for pair in pairs for buffer in pair if buffer is not None]
    if world is None or not buffers:
        return 0
    rows = process_groups.gather(torch.cat([buffer.detach().double() for buffer in buffers]), world)
    columns = torch.split(rows, [len(buffer) for buffer in buffers], dim=1)
    with torch.no_grad():
        for mean, var, means, variances in zip(buffers[::2], buffers[1::2], columns[::2], columns[1::2], strict=True):
            mean.copy_(means.mean(0))
            var.copy_(variances.mean(0) + means.var(0, correction=0))
    return len(pairs)
