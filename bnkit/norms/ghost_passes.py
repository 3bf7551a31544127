"""Ghost batches on a CPU: a few passes over the dense tensor where it lies, whatever its layout and the grouping.

To torch's own batch norm each ghost is a call, or ghosts are channels, as which not every layout can be seen without a
copy. Here a pass takes the whole tensor: means of each ghost and channel, then those numbers broadcast over the values.
The result's buffer is the scratch, so that nothing else of the tensor's size is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from bnkit.norms.ghost_blocks import GhostBlocks
from bnkit.norms.ghost_calls import GhostCalls, Grouping, is_channels_last

__all__ = ["GhostPasses", "can_pass"]

_KNOWN = (Tensor, nn.Parameter, type(None))


def can_pass(x: Tensor, *others: Tensor | None) -> bool:
    """Whether [`GhostPasses`][] can take x and the layer's tensors of shape (C,), and nothing but autograd looks on."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return False
    for other in others:
        if other is not None and (other.dtype is not x.dtype or not other.is_cpu or len(other) != x.shape[1]):
            return False
    return (x.is_contiguous() or is_channels_last(x)) and not _is_watched(x, *others)


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether something beside autograd's backward pass must see the operations: a transform, a tracer, a subclass."""
    return (
        any(type(tensor) not in _KNOWN for tensor in tensors)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


class GhostPasses(Function):
    """Batch normalization over ghosts, with its exact gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        count: int,
        grouping: Grouping,
        tracks: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output and, if they are tracked, mean and unbiased variance of all values, each of shape (C,)."""
        ghosts = GhostBlocks(x, count, grouping)
        output = torch.empty_like(x)
        given, out = ghosts.blocks(x), ghosts.blocks(output)
        mean, var = ghosts.moments(given, scratch=out)
        inverse = (var + eps).rsqrt_()
        scale = inverse if weight is None else inverse * weight
        shift = (mean * scale).neg_() if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        ghosts.scale_and_shift(given, scale, shift, out)
        ctx.save_for_backward(x, weight, mean, inverse, scale)
        ctx.eps, ctx.ghosts = eps, ghosts
        ctx.set_materialize_grads(False)
        if not tracks:
            return output, None, None
        whole = ghosts.pool(mean, var)
        ctx.mark_non_differentiable(*whole)
        return output, *whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; they can be differentiated again."""
        rest = (None,) * 4
        if grad is None:
            return None, None, None, *rest
        x, weight, mean, inverse, scale = ctx.saved_tensors
        # A batch of gradients (is_grads_batched) is of torch's older vmap, which counts as no transform.
        if torch.is_grad_enabled() or _is_watched(x, grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            return *_composed(ctx, x, weight, grad), *rest
        ghosts: GhostBlocks = ctx.ghosts
        grad_x = torch.empty_like(x)
        upstream, given, out = ghosts.blocks(ghosts.laid_out(grad)), ghosts.blocks(x), ghosts.blocks(grad_x)
        plain, product = ghosts.gradient_means(upstream, given, mean, scratch=out)
        product.mul_(inverse)
        wanted = ctx.needs_input_grad
        by_weight, by_bias = ghosts.whole(product) if wanted[1] else None, ghosts.whole(plain) if wanted[2] else None
        if wanted[0]:  # scale * (grad - plain - (x - mean) * inverse * product)
            slope = product.mul_(inverse).mul_(scale).neg_()
            shift = plain.mul_(scale).addcmul_(slope, mean).neg_()
            ghosts.scale_and_shift(given, slope, shift, out)
            ghosts.add_scaled(upstream, scale, out)
        return grad_x if wanted[0] else None, by_weight, by_bias, *rest


def _composed(ctx: Any, x: Tensor, weight: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias by operations that autograd and transforms know."""
    again, wanted = torch.is_grad_enabled(), ctx.needs_input_grad
    with torch.enable_grad():
        # Views of them: x may itself depend on the weight, and that is no part of this gradient.
        x, weight = x.view_as(x), None if weight is None else weight.view_as(weight)
        output, _, _ = GhostCalls(ctx.ghosts.count, ctx.ghosts.grouping, weight, None, ctx.eps)(x)
        inputs = [tensor for tensor, needed in zip((x, weight), wanted, strict=False) if needed and tensor is not None]
        grads = list(torch.autograd.grad(output, inputs, grad, create_graph=again)) if inputs else []
    by_bias = grad.sum([dim for dim in range(x.dim()) if dim != 1]) if wanted[2] else None
    return grads.pop(0) if wanted[0] else None, grads.pop(0) if wanted[1] else None, by_bias
