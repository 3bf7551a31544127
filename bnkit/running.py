"""Reading, writing and temporarily replacing a model's running statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnkit.layers import batch_norm_layers
from bnkit.preservation import undoing

__all__ = ["Statistics", "read_statistics", "running_statistics", "write_statistics"]

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> (running mean, running variance), each of shape (C,)."""


def read_statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of the running statistics of every BatchNorm layer that has them, by layer name."""
    return {
        name: (layer.running_mean.clone(), layer.running_var.clone())
        for name, layer in batch_norm_layers(model).items()
        if layer.running_mean is not None and layer.running_var is not None
    }


def write_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Write running statistics into the model's buffers, in place and all at once.

    Raises:
        KeyError: where the model has no such layer, or the layer no running statistics.
        ValueError: where a layer has another number of channels, or a number does not fit the buffer's dtype. In either
            case nothing is written.
    """
    layers = batch_norm_layers(model)
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for name, pair in statistics.items():
        layer = layers.get(name)
        if layer is None or layer.running_mean is None or layer.running_var is None:
            raise KeyError(f"The model has no BatchNorm layer {name!r} with running statistics to write to.")
        for buffer, value in zip((layer.running_mean, layer.running_var), pair, strict=True):
            if buffer.shape != value.shape:
                raise ValueError(
                    f"The layer {name!r} has {len(buffer)} channels, but the statistics are of {len(value)}."
                )
            cast = value.to(buffer.dtype)
            if bool(cast.isinf().any()) and bool((cast.isinf() & value.isfinite()).any()):
                raise ValueError(
                    f"The statistics of layer {name!r} are too large for its {buffer.dtype} buffers: "
                    "keep the model's BatchNorm layers in float32."
                )
            targets.append(buffer)
            values.append(cast.to(buffer.device))
    # One call for all: Python looks for Ctrl-C only between calls, so no layer is left behind.
    if targets:
        with torch.no_grad(), torch.inference_mode(any(target.is_inference() for target in targets)):
            torch._foreach_copy_(targets, values)


@contextmanager
def running_statistics(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Put other running statistics into the model for the time of the block; what was there comes back, bit for bit.

    Args:
        model: the model.
        statistics: such as ``report.before`` of a recalibration, to evaluate by what the model had before it.

    Raises:
        KeyError, ValueError: as ``write_statistics``.
    """
    kept = {name: pair for name, pair in read_statistics(model).items() if name in statistics}
    with undoing(lambda: write_statistics(model, kept)):
        write_statistics(model, statistics)
        yield
