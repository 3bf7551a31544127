"""The models that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Networks", "backward_of", "chain", "networks_of"]

Networks = list[tuple[tuple[int, ...], int]]
"""Depths of a ``bnkit.training.ResNet`` and the pixels of its images."""


def networks_of(depths: Sequence[int] | Sequence[Sequence[int]], pixels: int | Sequence[int]) -> Networks:
    """One network, ``[2, 2, 2, 2]``, or several, ``[[2, 2, 2, 2], [12, 12, 12, 13]]``, and the pixels of each.

    Raises:
        ValueError: where there are not as many pixels as networks.
    """
    several = [tuple(one) for one in depths if not isinstance(one, int)]
    several = several or [tuple(one for one in depths if isinstance(one, int))]
    sizes = [pixels] * len(several) if isinstance(pixels, int) else list(pixels)[: len(several)]
    if len(sizes) != len(several):
        raise ValueError(f"pixels has {len(sizes)} numbers, but depths {len(several)} networks: give one number each.")
    return list(zip(several, sizes, strict=True))


def chain(layers: int, channels: int, kernel: int = 3, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """So many times convolution, BatchNorm and ReLU, all of the same channels: the work grows with the layers."""
    steps: list[nn.Module] = []
    for _ in range(layers):
        convolution = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        steps += [convolution, norm(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


def backward_of(module: Callable[[Tensor], Tensor], x: Tensor, times: int = 1) -> Callable[[], None]:
    """Forward and backward on ``x``, with the gradient of ``x`` and of the parameters, some times over."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    gradient = torch.randn_like(leaf)

    def run() -> None:
        for _ in range(times):
            leaf.grad = None
            module(leaf).backward(gradient)  # type: ignore[no-untyped-call]

    return run
