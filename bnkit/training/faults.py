"""Faults to plant in a run, to see how the monitor tells them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.layers import batch_norm_layers

__all__ = ["DeadLayer", "FrozenLayer", "NotANumber", "ShiftedInputs"]


class _Fault(Callback):
    """Something that goes wrong from a training step on.

    Args:
        step: the first training batch, counted from 0, that it concerns.

    Raises:
        ValueError: for a negative step.
    """

    def __init__(self, step: int) -> None:
        if step < 0:
            raise ValueError(f"step is the number of a training batch, at least 0, not {step!r}.")
        self.step = step
        self._batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Count from the beginning of the fit."""
        self._batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Do what is due before this batch."""
        if self._batches >= self.step:
            self._plant(pl_module, batch, first=self._batches == self.step)
        self._batches += 1

    def _plant(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:
        raise NotImplementedError


class ShiftedInputs(_Fault):
    """From a step on the images are on another scale: a loader that forgets to normalise.

    Args:
        step: see the class above: the first batch.
        scale: what pixels are multiplied with.
        offset: what is added then.
    """

    def __init__(self, step: int, scale: float = 2.0, offset: float = 1.0) -> None:
        super().__init__(step)
        self.scale, self.offset = scale, offset

    def _plant(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:  # noqa: ARG002
        batch[0].mul_(self.scale).add_(self.offset)


class NotANumber(_Fault):
    """One batch of images is NaN: a broken file."""

    def _plant(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:  # noqa: ARG002
        if first:
            batch[0].fill_(torch.nan)


class FrozenLayer(_Fault):
    """From a step on a BatchNorm layer is in evaluation mode, and what comes before it goes on learning.

    Args:
        step: the first batch.
        layer: its name.
    """

    def __init__(self, step: int, layer: str) -> None:
        super().__init__(step)
        self.layer = layer

    def _plant(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:  # noqa: ARG002
        _layer(pl_module, self.layer).eval()


class DeadLayer(_Fault):
    """At a step a BatchNorm layer's weight becomes 0 and its bias negative: nothing gets through the ReLU after it.

    Args:
        step: the batch before which it happens.
        layer: its name.
    """

    def __init__(self, step: int, layer: str) -> None:
        super().__init__(step)
        self.layer = layer

    @torch.no_grad()
    def _plant(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:  # noqa: ARG002
        if first:
            layer = _layer(pl_module, self.layer)
            layer.weight.zero_()
            layer.bias.fill_(-1)


def _layer(pl_module: LightningModule, name: str) -> _BatchNorm:
    layers = batch_norm_layers(pl_module)
    if name not in layers:
        raise ValueError(f"There is no BatchNorm layer {name!r} to plant a fault in; there are {list(layers)}.")
    return layers[name]
