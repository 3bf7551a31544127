"""Layers before a normalization whose weights are centred or standardized in each forward, under the same keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnkit.norms.spec import RECORD, Swapped, original_class, undo

__all__ = ["centered", "check_weights", "standardized", "swap_weights"]


def centered(weight: Tensor) -> Tensor:
    """The weights of each output channel less their mean."""
    return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def standardized(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The weights of each output channel with mean 0 and variance 1."""
    var, mean = torch.var_mean(weight, tuple(range(1, weight.dim())), correction=0, keepdim=True)
    return (weight - mean) * (var + eps).rsqrt()


class _Centered:
    def _weights(self) -> Tensor:
        return centered(self.weight)  # type: ignore[attr-defined]


class _Standardized:
    def _weights(self) -> Tensor:
        return standardized(self.weight)  # type: ignore[attr-defined]


class _Convolution:
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        output: Tensor = self._conv_forward(input, self._weights(), self.bias)  # type: ignore[attr-defined]
        return output


class CenteredConv1d(_Convolution, _Centered, nn.Conv1d):
    """A convolution by its centred weights."""


class CenteredConv2d(_Convolution, _Centered, nn.Conv2d):
    """A convolution by its centred weights."""


class CenteredConv3d(_Convolution, _Centered, nn.Conv3d):
    """A convolution by its centred weights."""


class CenteredLinear(_Centered, nn.Linear):
    """A linear layer by its centred weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As torch's, by the centred weights."""
        return F.linear(input, self._weights(), self.bias)


class StandardizedConv1d(_Convolution, _Standardized, nn.Conv1d):
    """A convolution by its standardized weights."""


class StandardizedConv2d(_Convolution, _Standardized, nn.Conv2d):
    """A convolution by its standardized weights."""


class StandardizedConv3d(_Convolution, _Standardized, nn.Conv3d):
    """A convolution by its standardized weights."""


class StandardizedLinear(_Standardized, nn.Linear):
    """A linear layer by its standardized weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As torch's, by the standardized weights."""
        return F.linear(input, self._weights(), self.bias)


_CLASSES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "centered": {
        nn.Conv1d: CenteredConv1d,
        nn.Conv2d: CenteredConv2d,
        nn.Conv3d: CenteredConv3d,
        nn.Linear: CenteredLinear,
    },
    "standardized": {
        nn.Conv1d: StandardizedConv1d,
        nn.Conv2d: StandardizedConv2d,
        nn.Conv3d: StandardizedConv3d,
        nn.Linear: StandardizedLinear,
    },
}


def check_weights(module: nn.Module | None, spec: Any) -> None:
    """Refuse what ``swap_weights`` cannot swap.

    Raises:
        TypeError: for no module, one of another class (a transposed or a parametrized convolution), one whose weight is
            computed before each forward, and one whose output channels have a single weight each.
    """
    cls = None if module is None else original_class(module)
    if module is None or cls not in _CLASSES["centered"]:
        found = "there is none" if cls is None else f"it is a {cls.__module__}.{cls.__qualname__}"
        raise TypeError(f"{spec} needs an nn.Conv1d, Conv2d, Conv3d or Linear right before the layer, and {found}.")
    if "weight" not in module._parameters:
        raise TypeError(
            f"{spec} works by the weight of {module}, and that is computed by a hook (weight_norm, spectral_norm, "
            "pruning): make it permanent first."
        )
    if module.weight[0].numel() < 2:  # type: ignore[index]
        raise TypeError(f"{spec} needs more than one weight an output channel, and {module} has one: less its mean, 0.")


def swap_weights(module: nn.Module, how: str, spec: Any) -> None:
    """Let a layer work by its ``"centered"`` or ``"standardized"`` weights; ``undo`` gives its class back."""
    undo(module)
    cls = type(module)
    module.__class__ = _CLASSES[how][cls]
    setattr(module, RECORD, Swapped(cls, spec))
