"""The train-eval gap: what a batch becomes by its own statistics, and by the running ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.feeding import Forward, default_forward, feed, samples_in
from bnkit.layers import batch_norm_layers, unwrap
from bnkit.moments import Moments, to_float64
from bnkit.norms import Variant
from bnkit.observation import observe
from bnkit.preservation import preserved, random_states_preserved
from bnkit.stand_ins import stand_ins

__all__ = ["GapReport", "Loss", "default_loss", "train_eval_gap"]

Loss = Callable[[Any, Any], Tensor]
"""A function of (output, batch) for ``train_eval_gap``, of (model, batch) for ``internal_covariate_shift``."""


class GapReport(NamedTuple):
    """What changes for one batch when BatchNorm goes from the batch's statistics to the running ones.

    Attributes:
        loss: ``loss_running - loss_batch``; None where unknown.
        loss_batch: loss by the batch's statistics; None where unknown.
        loss_running: loss by the running statistics; None where unknown.
        disagreement: fraction of the predictions that differ, 0 to 1; a prediction is the largest entry over dimension
            1. None where the output is no floating tensor (N, C, …) with C >= 2.
        output: root mean square of the outputs' difference, over that of the output by the batch's statistics, >= 0;
            None where the output has no floating tensors, or others in the two passes.
        samples: in the batch.
        seen: layer name -> what the layer normalised in the pass by the batch's statistics, dropout off. A layer that
            was not reached has no entry.
    """

    loss: float | None
    loss_batch: float | None
    loss_running: float | None
    disagreement: float | None
    output: float | None
    samples: int
    seen: dict[str, Moments]


def train_eval_gap(
    model: nn.Module, batch: Any, *, forward: Forward | None = None, loss: Loss | None = None
) -> GapReport:
    """How much the model's output depends on whose statistics normalise: the batch's, or the running ones.

    The same batch goes twice through the same weights, with no gradient and everything else in evaluation mode (dropout
    off): once with the BatchNorm layers in training mode, once with them in evaluation mode. So it is the part of the
    difference between training and inference that is BatchNorm's alone.

    Layers that training holds frozen (in evaluation mode while the model is in training mode, and ``Frozen`` ones)
    normalise by their running statistics in both passes. Compiled models run eagerly meanwhile. Layers that are
    synchronized over ranks wait for the other ranks, which must call this too. The cost: two forwards.

    Args:
        model: any module with layers of the ``torch.nn.BatchNorm*`` family; DistributedDataParallel and torch.compile
            wrappers are looked through.
        batch: one batch, as the loader gives it.
        forward: how to run the model on it, as in [`bnkit.recalibrate`][].
        loss: function of (output, batch) to a scalar tensor. Default: cross-entropy where the batch is (input, integer
            targets) and these are classes of an output (N, C, …); mean squared error where the targets are floating and
            of the output's shape; else unknown.

    Raises:
        ValueError: for a model without BatchNorm layers, or a batch that leaves one a single value per channel.
        TypeError: for a batch that the default forward cannot feed, or a scripted model.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(64, 3), torch.randint(2, (64,))
        >>> train_eval_gap(model, batch).output < 0.2  # fresh running statistics, and the input is standard normal
        True
    """
    model = unwrap(model)
    layers = batch_norm_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layers, so there is no train-eval gap to measure: "
            "probe the model that has them."
        )
    by_batch = {name: layer for name, layer in layers.items() if not _is_frozen(model, layer)}
    loss = default_loss if loss is None else loss
    with (
        torch.inference_mode(any(buffer.is_inference() for buffer in model.buffers())),
        torch.no_grad(),
        stand_ins(by_batch),
    ):
        batch_output, loss_batch, seen = _evaluate(model, batch, by_batch, forward, loss)
        running_output, loss_running, _ = _evaluate(model, batch, {}, forward, loss)
        gap = None if loss_batch is None or loss_running is None else loss_running - loss_batch
        disagreement = _disagreement(batch_output, running_output)
        output = _relative_difference(batch_output, running_output)
    return GapReport(gap, loss_batch, loss_running, disagreement, output, samples_in(batch), seen)


def default_loss(output: Any, batch: Any) -> Any:
    """Cross-entropy or mean squared error where the batch and the output are such; else None."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        return None
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        return None
    target = batch[1].to(output.device)
    output = output.to(torch.promote_types(output.dtype, torch.float32))  # half precision would round the loss
    if target.is_floating_point():
        return F.mse_loss(output, target.to(output.dtype)) if target.shape == output.shape else None
    if target.dtype is torch.bool or target.is_complex() or not _are_scores(output):
        return None
    target = target.long()
    fits = target.shape == output.shape[:1] + output.shape[2:]
    if not fits or bool(((target < 0) | (target >= output.shape[1])).any()):
        return None
    return F.cross_entropy(output, target)


def _is_frozen(model: nn.Module, layer: _BatchNorm) -> bool:
    """Whether training normalises by the layer's running statistics, and leaves them."""
    return (model.training and not layer.training) or (isinstance(layer, Variant) and layer.holds_statistics)


def _evaluate(
    model: nn.Module, batch: Any, by_batch: Mapping[str, _BatchNorm], forward: Forward | None, loss: Loss
) -> tuple[Any, float | None, dict[str, Moments]]:
    """Output, loss, and what the layers normalised, with these layers alone in training mode."""
    output: Any = None

    def run(model: nn.Module, batch: Any) -> None:
        nonlocal output
        output = (forward or default_forward)(model, batch)

    with random_states_preserved(model), preserved(model), observe(model, exact=True) as seen:
        for module in model.modules():
            module.training = False
        for layer in by_batch.values():
            layer.training = True
        feed(model, batch, 0, run)
        value = loss(output, batch)
        if value is not None and torch.as_tensor(value).numel() != 1:
            raise ValueError(
                f"loss gave a tensor of shape {tuple(value.shape)}: it must be one number, such as its mean."
            )
        return output, None if value is None else float(value), dict(seen)


def _are_scores(output: Any) -> bool:
    """Whether the output can be scores of classes, in dimension 1."""
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.ndim >= 2
        and output.shape[1] >= 2
        and output.numel() > 0
    )


def _disagreement(one: Any, other: Any) -> float | None:
    if not (_are_scores(one) and _are_scores(other) and one.shape == other.shape):
        return None
    return float((one.argmax(1) != other.argmax(1)).double().mean())


def _relative_difference(one: Any, other: Any) -> float | None:
    """Root mean square of the difference over that of the first, over all floating tensors in them."""
    ones, others = list(_floating(one)), list(_floating(other))
    if not ones or [x.shape for x in ones] != [x.shape for x in others]:
        return None
    difference = sum(float((to_float64(x) - to_float64(y)).square().sum()) for x, y in zip(ones, others, strict=True))
    size = sum(float(to_float64(x).square().sum()) for x in ones)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float((difference / size) ** 0.5)


def _floating(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _floating(item)
