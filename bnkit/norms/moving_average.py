"""Moving average batch normalization: forward and backward statistics averaged over the last batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.base import Variant, accumulation_dtype, gradient_sums, normalize_by, per_channel, uncompiled
from bnkit.norms.convolution import centered, check_weights, swap_weights
from bnkit.norms.spec import Context, Spec, undo

__all__ = ["MovingAverage", "MovingAverageBatchNorm1d", "MovingAverageBatchNorm2d", "MovingAverageBatchNorm3d"]

STEP, FORWARD, BACKWARD = "_moving_step", "_moving_forward", "_moving_backward"


class _Step(NamedTuple):
    """What one training forward hands to its backward."""

    slot: Tensor  # (1,), where in the window this step is
    averaging: Tensor  # scalar, whether the window's mean is used yet


class _MovingAverage(Variant):
    """Normalises by averages over the last batches; see [`bnkit.norms.MovingAverage`][]."""

    trains_by_statistics = True

    @property
    def averages(self) -> dict[str, Tensor]:
        """The step and the last batches' statistics: what resuming exactly needs beside the state_dict, by name.

        Write to these tensors (``copy_``) to restore them.
        """
        return {name: self._state(name) for name in (STEP, FORWARD, BACKWARD)}

    def _state(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        if buffer is None:
            raise RuntimeError(f"The layer has lost its {name}.")
        return buffer

    def remembers(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean 0 and E[x²]: the layer subtracts no mean."""
        return torch.zeros_like(mean), var + mean.square()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Moving average batch normalization in training mode; BatchNorm's inference otherwise."""
        if not self.training:
            return super().forward(input)
        self._check_shape(input)
        if input.numel() == 0:
            return super().forward(input)
        output: Tensor = self._normalize(input)
        return output

    @uncompiled
    def _normalize(self, input: Tensor) -> Tensor:  # noqa: A002
        # Not compiled: a compiled backward pass loses what it writes to the window, and says nothing (torch 2.13).
        spec: MovingAverage = self.spec
        dtype = accumulation_dtype(input)
        with torch.no_grad():
            step = self._state(STEP).add_(1)
            now = _Step((step % spec.window).view(1), (step > spec.window) & (step >= spec.warmup_steps))
            batch = input.detach().to(dtype).square().mean([d for d in range(input.dim()) if d != 1])
            window = self._state(FORWARD)
            _remember(window, now.slot, batch)
            second = torch.where(now.averaging, window.mean(0).to(dtype), batch)
            correction = self._correction(second, step > max(spec.renorm_steps, spec.warmup_steps))
        output: Tensor = _Normalized.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, second, correction, self.eps, self._state(BACKWARD), *now
        )
        self._update_running(torch.zeros_like(batch), batch)
        return output

    def _correction(self, second: Tensor, on: Tensor) -> Tensor:
        """r, shape (C,). A trained BatchNorm's statistics are first made E[x²] about 0."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise RuntimeError("MovingAverage works by running statistics, and the layer has lost its own.")
        running = var + mean.square()
        if self.track_running_stats:
            var.copy_(running)
            mean.zero_()
        limit = self.spec.r_max
        r = ((second + self.eps) / (running.to(second.dtype) + self.eps)).sqrt().clamp(1 / limit, limit)
        return torch.where(on, r, torch.ones_like(r))


class _Normalized(Function):
    """``weight * r * x / sqrt(second + eps) + bias``, with the backward pass of the paper instead of the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        second: Tensor,
        correction: Tensor,
        eps: float,
        window: Tensor,
        slot: Tensor,
        averaging: Tensor,
    ) -> Tensor:
        """The output."""
        ctx.save_for_backward(x, weight, bias, second, correction, slot, averaging)
        ctx.eps, ctx.window = eps, window
        scale = correction if weight is None else (weight * correction).to(weight.dtype)
        shift = torch.zeros_like(scale) if bias is None else bias
        return normalize_by(x, torch.zeros_like(second), second, scale, shift, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The paper's equation, by the window's mean of ``E[y * dL/dy]``."""
        x, weight, bias, second, correction, slot, averaging = ctx.saved_tensors
        scaled, plain = gradient_sums(grad, x, torch.zeros_like(second), second, ctx.eps)
        factor = correction if weight is None else correction * weight
        batch = factor * scaled / (x.numel() // x.shape[1])
        window: Tensor = ctx.window
        _remember(window, slot, batch)
        moment = torch.where(averaging, window.mean(0).to(batch.dtype), batch)
        inverse = (second + ctx.eps).rsqrt()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * per_channel(factor * inverse, x) - x * per_channel(inverse.square() * moment, x)
            grad_x = grad_x.to(x.dtype)
        grad_weight = (correction * scaled).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = plain.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class MovingAverageBatchNorm1d(_MovingAverage, nn.BatchNorm1d):
    """Moving average batch normalization over (N, C) or (N, C, L); see [`bnkit.norms.MovingAverage`][]."""


class MovingAverageBatchNorm2d(_MovingAverage, nn.BatchNorm2d):
    """Moving average batch normalization over (N, C, H, W); see [`bnkit.norms.MovingAverage`][]."""


class MovingAverageBatchNorm3d(_MovingAverage, nn.BatchNorm3d):
    """Moving average batch normalization over (N, C, D, H, W); see [`bnkit.norms.MovingAverage`][]."""


@dataclass(frozen=True)
class MovingAverage(Spec):
    r"""Normalization by second moments that are averaged over the last batches, forward and backward (MABN).

    $$
    z = \frac{x}{\sqrt{\bar\chi^2 + \epsilon}},\quad y = \gamma r z + \beta,\quad
    \frac{\partial L}{\partial x} = \frac{1}{\sqrt{\bar\chi^2 + \epsilon}}
    \left(\gamma r \frac{\partial L}{\partial y} - z \bar\Psi\right)
    $$

    with $\chi^2 = E[x^2]$ and $\Psi = E[\gamma r z\, \partial L / \partial y]$ per channel, the bar
    their mean over the last ``window`` batches, and $r = \mathrm{clip}_{[1/r_{max},
    r_{max}]}(\sqrt{(\bar\chi^2 + \epsilon) / (running\_var + \epsilon)})$ without gradient. No mean is subtracted:
    the weights of the convolution before are centred instead (each output channel's mean is taken away in each
    forward), under the same key.

    Warning:
        The backward pass is not the gradient of the forward pass; gradient checks do not apply. It is a method to train
        with from the start: centring a trained convolution's weights changes what it computes. A bias in that
        convolution is not centred. Call it once a step: several calls, or accumulation, fill the window faster.
        Under ``torch.compile`` the graph breaks here. With a loss scaler, averages of the backward pass are of mixed
        scales for ``window`` steps after the scale has changed; what is not finite stays out of them. Its state_dict
        fits plain BatchNorm, but holds convolution weights that are centred only when used: revert the model before
        saving it for plain BatchNorm.

    Training: until the window is full and ``warmup_steps`` have passed, both averages are the batch's own; until
    ``renorm_steps`` have passed, r is 1. ``running_mean`` is 0 and ``running_var`` an average of $\chi^2$ by
    BatchNorm's rule and the layer's momentum (the paper's is 0.02 in torch's convention). The step and the two windows
    are buffers outside the state_dict, so a plain checkpoint loads; ``layer.averages`` gives them to a callback.

    Inference: BatchNorm's own, by mean 0 and variance E[x²]. Undoing leaves a plain BatchNorm with the same
    inference; if the layer was trained since the swap, the convolution's weights are then centred for good.

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR
    2020, section 4. (They average the running statistics from the window's mean; here from the batch, as BatchNorm
    does.)

    Args:
        window: batches to average over.
        warmup_steps: training forwards before the averages are used.
        renorm_steps: training forwards before r is used.
        r_max: largest correction r, at least 1.
        center_weights: whether to centre the weights before the layer. Without it, its input should have mean 0.
    """

    window: int = 16
    warmup_steps: int = 100
    renorm_steps: int = 1000
    r_max: float = 5.0
    center_weights: bool = True

    layers = (MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d)
    needs_running_statistics = True

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("warmup_steps", 0), ("renorm_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"MovingAverage's {name} is an int of at least {least}, not {value!r}.")
        if not math.isfinite(self.r_max) or self.r_max < 1:
            raise ValueError(f"MovingAverage's r_max is a factor of at least 1, not {self.r_max!r}.")
        if not isinstance(self.center_weights, bool):
            raise ValueError(f"MovingAverage's center_weights is True or False, not {self.center_weights!r}.")

    @property
    def needs_convolution(self) -> bool:  # type: ignore[override]
        """Whether the convolution before the layer takes part."""
        return self.center_weights

    def check(self, layer: _BatchNorm, context: Context) -> None:
        """Refuse, beside the usual, a convolution whose weights cannot be centred."""
        super().check(layer, context)
        if self.center_weights:
            check_weights(context.convolution, self)

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:
        """Add the step and the two windows, and swap the convolution."""
        like = layer.running_var
        device, dtype = (None, None) if like is None else (like.device, accumulation_dtype(like))
        layer.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        for name in (FORWARD, BACKWARD):
            empty = torch.zeros(self.window, layer.num_features, dtype=dtype, device=device)
            layer.register_buffer(name, empty, persistent=False)
        convolution = context.convolution if self.center_weights else None
        if convolution is not None:
            swap_weights(convolution, "centered", self)
        return {"convolution": convolution}

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:
        """Take the windows away; give the convolution its class back, and its weights as they were used."""
        for name in (STEP, FORWARD, BACKWARD):
            del layer._buffers[name]
            layer._non_persistent_buffers_set.discard(name)
        convolution = kept["convolution"]
        if convolution is not None:
            undo(convolution)
            if _has_trained(layer):
                with torch.no_grad():
                    convolution.weight.copy_(centered(convolution.weight))


def _has_trained(layer: _BatchNorm) -> bool:
    """Whether the statistics are a moving average's, which every training forward and every checkpoint of one tell."""
    mean, batches = layer.running_mean, layer.num_batches_tracked
    if mean is None or mean.is_meta or batches is None:
        return False
    return bool(batches > 0) and not bool(mean.any())


def _remember(window: Tensor, slot: Tensor, batch: Tensor) -> None:
    """Write a batch's statistic to the window, but for what is not finite.

    A loss scaler skips the step of an overflow, so the window, which nothing else would clear for many steps, must too.
    """
    kept = torch.where(batch.isfinite(), batch.to(window.dtype), window[slot][0])
    window.index_copy_(0, slot, kept[None])
