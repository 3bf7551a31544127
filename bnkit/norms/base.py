"""What all variants share: their base class, the running statistics' update, and a batch's statistics."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.spec import RECORD

__all__ = [
    "Scoped",
    "Variant",
    "accumulation_dtype",
    "batch_statistics",
    "gradient_sums",
    "normalize_by",
    "per_channel",
    "uncompiled",
]


P = ParamSpec("P")
R = TypeVar("R")


class Variant(_BatchNorm):
    """A BatchNorm layer that was made from torch's own by a spec; see [`bnkit.norms.Spec.apply`][]."""

    holds_statistics: ClassVar[bool] = False
    """Whether the running statistics are not to change: training normalises by them."""
    trains_by_statistics: ClassVar[bool] = False
    """Whether a training forward normalises by the running statistics too, so that writing them changes training."""
    by_sample: ClassVar[bool] = False
    """Whether each sample is normalised by itself, in either mode: there are no batch statistics."""
    waits_for_ranks: ClassVar[bool] = False
    """Whether a training forward has a collective, in which every rank must take part."""

    @property
    def spec(self) -> Any:
        """The spec that made the layer what it is."""
        record = self.__dict__.get(RECORD)
        if record is None:
            raise RuntimeError(f"{type(self).__name__} is made from a torch layer by its spec's apply, not directly.")
        return record.spec

    def parts_of(self, samples: int) -> int:  # noqa: ARG002
        """Into how many parts, each normalised by itself, a training batch of so many samples is cut."""
        return 1

    def remembers(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the running buffers should hold for a population of this mean and variance; for a recalibration."""
        return mean, var

    def extra_repr(self) -> str:
        """BatchNorm's own line, and the spec."""
        return f"{super().extra_repr()}, {self.spec}"  # type: ignore[no-untyped-call]

    def _check_shape(self, input: Tensor) -> None:  # noqa: A002
        self._check_input_dim(input)  # type: ignore[no-untyped-call]

    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """One step of the running statistics, by BatchNorm's rule: ``(1 - momentum) * running + momentum * batch``."""
        if not (self.training and self.track_running_stats):
            return
        with torch.no_grad():
            factor: float | Tensor = 0.0 if self.momentum is None else self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    # As a tensor, not as torch's float(): a compiled graph does not break on it.
                    factor = self.num_batches_tracked.to(mean.dtype).reciprocal()
            for running, batch in ((self.running_mean, mean), (self.running_var, unbiased_var)):
                if running is not None and running.dtype == batch.dtype:
                    running.lerp_(batch, factor)
                elif running is not None:
                    running.copy_(running.to(batch.dtype) * (1 - factor) + batch * factor)


class Scoped(Variant):
    r"""The exact batch estimator over a chosen *scope*: the samples whose mean and variance normalise a sample.

    $$y = \gamma \frac{x - \mu_s}{\sqrt{\sigma_s^2 + \epsilon}} + \beta$$

    where s is a ghost batch ([`bnkit.norms.Ghost`][]), the device's batch (torch's own layer) or the batch of several
    ranks ([`bnkit.norms.Sync`][]). A subclass says when its scope is just the device's batch, and normalises where it
    is not. Inference is BatchNorm's own, by the running statistics.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise over the scope in training mode, as BatchNorm does otherwise."""
        if not self.training or self._is_device_batch(input):
            return super().forward(input)
        self._check_shape(input)
        output, mean, unbiased_var = self._normalize(input)
        if mean is not None and unbiased_var is not None:
            self._update_running(mean, unbiased_var)
        return output

    def _is_device_batch(self, input: Tensor) -> bool:  # noqa: A002
        raise NotImplementedError

    def _normalize(self, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # noqa: A002
        """The output, and mean and unbiased variance of all samples seen; None where there is nothing to update."""
        raise NotImplementedError


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, without importing dynamo, which is as slow to import as torch itself."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # then nothing is compiled
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype for statistics of x: float64 for float64, float32 for all others."""
    return torch.promote_types(x.dtype, torch.float32)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel, each of shape (C,) and without a graph, and the number of values.

    An empty batch has mean and variance 0.
    """
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1], dtype=accumulation_dtype(x))
        return zero, zero.clone(), 0
    count, values = x.numel() // x.shape[1], x.detach().to(accumulation_dtype(x))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # BatchNorm's own first half: as exact as plain BatchNorm is, and several times faster than var_mean here.
        mean, var = torch.batch_norm_update_stats(values, None, None, 1.0)
    else:
        var, mean = torch.var_mean(values, _all_but_channel(x), correction=0)
    return mean, var, count


def normalize_by(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias`` in one pass; all but x are of shape (C,)."""
    if weight is not None:
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per channel the sums of ``grad * (x - mean) / sqrt(var + eps)`` and of ``grad``, in one pass."""
    if x.numel() == 0:  # torch's kernel divides by zero here, and the process dies
        return torch.zeros_like(mean), torch.zeros_like(mean)
    mask = [False, True, True]
    ones = torch.ones_like(mean)  # without a weight, the sums would be of x's dtype
    _, scaled, plain = torch.ops.aten.native_batch_norm_backward(grad, x, ones, mean, var, None, None, False, eps, mask)
    return scaled, plain


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """A (C,) tensor as one that broadcasts over x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))


def _all_but_channel(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]
