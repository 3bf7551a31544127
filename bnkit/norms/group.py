"""Group normalization: the estimator is the sample's own groups of channels, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.norms.base import Variant
from bnkit.norms.convolution import check_weights, swap_weights
from bnkit.norms.spec import Context, Spec, undo

__all__ = ["Group", "GroupBatchNorm1d", "GroupBatchNorm2d", "GroupBatchNorm3d", "groups_for"]


class _Group(Variant):
    """Normalises each sample by its own groups of channels; see [`bnkit.norms.Group`][]."""

    by_sample = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Group normalization, in either mode."""
        self._check_shape(input)
        groups = groups_for(self.num_features, self.spec.num_groups)
        if self.num_features // groups * input.shape[2:].numel() == 1:
            raise ValueError(
                f"Group normalization of {groups} groups over an input of shape {tuple(input.shape)} has one value a "
                "group and would give zeros: use fewer groups than channels."
            )
        weight, bias = self._affine(groups)
        return F.group_norm(input, groups, weight, bias, self.eps)

    def _affine(self, groups: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, with the running statistics folded in where the spec says so."""
        weight, bias, spec = self.weight, self.bias, self.spec
        mean, var = self.running_mean, self.running_var
        if not spec.fold or spec.weight_standardization or mean is None or var is None:
            return weight, bias
        with torch.no_grad():
            dtype = torch.promote_types(var.dtype, torch.float32)
            means, variances = mean.to(dtype).view(groups, -1), var.to(dtype).view(groups, -1)
            group_mean = means.mean(1, keepdim=True)
            group_var = (variances + (means - group_mean).square()).mean(1, keepdim=True)
            sigma = (variances + self.eps).sqrt()
            scale = ((group_var + self.eps).sqrt() / sigma).flatten().to(var.dtype)
            shift = ((group_mean - means) / sigma).flatten().to(var.dtype)
        if weight is not None:
            scale, shift = weight * scale, weight * shift
        return scale, shift if bias is None else shift + bias


class GroupBatchNorm1d(_Group, nn.BatchNorm1d):
    """Group normalization over (N, C) or (N, C, L) with BatchNorm's keys; see [`bnkit.norms.Group`][]."""


class GroupBatchNorm2d(_Group, nn.BatchNorm2d):
    """Group normalization over (N, C, H, W) with BatchNorm's keys; see [`bnkit.norms.Group`][]."""


class GroupBatchNorm3d(_Group, nn.BatchNorm3d):
    """Group normalization over (N, C, D, H, W) with BatchNorm's keys; see [`bnkit.norms.Group`][]."""


@dataclass(frozen=True)
class Group(Spec):
    r"""Group normalization, under BatchNorm's keys and from a trained BatchNorm where there is one.

    $$
    y = \gamma' \frac{x - \mu_g(x)}{s_g(x)} + \beta',\quad
    \gamma' = \gamma \frac{s_g}{\sigma},\quad \beta' = \beta + \gamma \frac{\mu_g - \mu}{\sigma}
    $$

    with $\mu_g(x)$ and $s_g(x)$ of one sample's channels in group g, $\mu$ and $\sigma$ the
    running statistics of a channel, and $\mu_g$ and $s_g$ those pooled over the group. A sample whose
    groups are as the population's is normalised as BatchNorm's inference would. With ``fold=False``, and where there
    are no running statistics, $\gamma' = \gamma$ and $\beta' = \beta$.

    The fold is computed in each forward, so weight, bias and running statistics stay BatchNorm's: a plain checkpoint
    loads before or after the swap, and undoing gives the same tensors back. On a fresh layer it is the identity.

    Warning:
        This is not BatchNorm's inference. After training with it, the running statistics are those of before:
        recalibrate a model that is turned back into BatchNorm. While swapped the layer has
        ``track_running_stats=False``, so that nobody takes it for one that tracks.

    Training and inference: the same, by the sample alone. No buffer is ever updated.

    Source: Wu, He, "Group Normalization", ECCV 2018, section 3; weights: Qiao et al., "Micro-Batch Training with
    Batch-Channel Normalization and Weight Standardization", 2019.

    Args:
        num_groups: groups of channels. Where it does not divide the channels, the largest divisor below it is taken.
        fold: whether to start from the running statistics.
        weight_standardization: let the convolution before the layer work by weights of mean 0 and variance 1 an output
            channel. It changes what the convolution gives, so that there is nothing to fold and a trained model has to
            be trained on.
    """

    num_groups: int = 32
    fold: bool = True
    weight_standardization: bool = False

    layers = (GroupBatchNorm1d, GroupBatchNorm2d, GroupBatchNorm3d)

    def __post_init__(self) -> None:
        if isinstance(self.num_groups, bool) or not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(f"Group's num_groups is an int of at least 1, not {self.num_groups!r}.")
        for name in ("fold", "weight_standardization"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Group's {name} is True or False, not {getattr(self, name)!r}.")

    @property
    def needs_convolution(self) -> bool:  # type: ignore[override]
        """Whether the convolution before the layer takes part."""
        return self.weight_standardization

    def check(self, layer: _BatchNorm, context: Context) -> None:
        """Refuse, beside the usual, a convolution whose weights cannot be standardized."""
        super().check(layer, context)
        if self.weight_standardization:
            check_weights(context.convolution, self)

    def attach(self, layer: _BatchNorm, context: Context) -> dict[str, Any]:
        """Say that the layer does not track, and swap the convolution where it takes part."""
        kept: dict[str, Any] = {"track_running_stats": layer.track_running_stats, "convolution": None}
        layer.track_running_stats = False
        if self.weight_standardization and context.convolution is not None:
            swap_weights(context.convolution, "standardized", self)
            kept["convolution"] = context.convolution
        return kept

    def detach(self, layer: _BatchNorm, kept: dict[str, Any]) -> None:
        """Give the layer its tracking and the convolution its class back."""
        layer.track_running_stats = kept["track_running_stats"]
        if kept["convolution"] is not None:
            undo(kept["convolution"])


def groups_for(channels: int, num_groups: int) -> int:
    """The largest divisor of the channels that is at most ``num_groups``."""
    return max(groups for groups in range(1, min(num_groups, channels) + 1) if channels % groups == 0)
