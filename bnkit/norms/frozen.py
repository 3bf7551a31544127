"""Frozen statistics: the estimator is the population's, in training as at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.base import Variant
from bnkit.norms.spec import Context, Spec

__all__ = ["Frozen", "FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]


class _Frozen(Variant):
    """Normalises by the running statistics in either mode; see [`bnkit.norms.Frozen`][]."""

    holds_statistics = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """BatchNorm's inference, whatever the mode."""
        self._check_shape(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """Frozen batch normalization over (N, C) or (N, C, L); see [`bnkit.norms.Frozen`][]."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """Frozen batch normalization over (N, C, H, W); see [`bnkit.norms.Frozen`][]."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """Frozen batch normalization over (N, C, D, H, W); see [`bnkit.norms.Frozen`][]."""


@dataclass(frozen=True)
class Frozen(Spec):
    r"""Batch normalization by the running statistics, which no longer change.

    $$y = \gamma \frac{x - \mu_{running}}{\sqrt{\sigma_{running}^2 + \epsilon}} + \beta$$

    Warning:
        A frozen layer no longer bounds its output. Freeze a trained layer, best after recalibrating it: a fresh layer's
        statistics are 0 and 1, and freezing those takes the normalization away.

    Training: an affine map by constants; ``model.train()`` changes nothing, and no buffer is ever updated.

    Inference: BatchNorm's own, and the same as in training.

    Source: Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 4 (FrozenBN for the last epochs).

    Args:
        affine: whether weight and bias go on learning. If not, their ``requires_grad`` is False until the layer is
            undone.
    """

    affine: bool = True

    layers = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)
    needs_running_statistics = True

    def __post_init__(self) -> None:
        if not isinstance(self.affine, bool):
            raise ValueError(f"Frozen's affine is True (weight and bias learn) or False, not {self.affine!r}.")

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """Stop the gradients of weight and bias where they are not to learn."""
        parameters = {} if self.affine else dict(layer.named_parameters(recurse=False))
        kept = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return {"requires_grad": kept}

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:
        """Let weight and bias learn again where they did."""
        parameters = dict(layer.named_parameters(recurse=False))
        for name, learns in kept["requires_grad"].items():
            parameters[name].requires_grad_(learns)
