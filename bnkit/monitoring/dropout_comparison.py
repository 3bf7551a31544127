"""What dropout changes of the variance that layers meet in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bnkit.layers import unwrap
from bnkit.moments import Moments
from bnkit.monitoring.alarms import DROPOUT_RATIO
from bnkit.monitoring.normalized_together import is_synchronized
from bnkit.monitoring.step_measures import StepMeasures
from bnkit.monitoring.step_recorder import Steps
from bnkit.probes import dropout_variance_shift

__all__ = ["compare_variances", "dropout_before", "worth_a_word"]


def compare_variances(
    model: nn.Module,
    recorded: Sequence[tuple[StepMeasures, Steps]],
    layers: Mapping[str, _BatchNorm],
    without: Mapping[str, Moments],
) -> dict[str, float]:
    """The last recorded step against what its batch looks like without dropout.

    Args:
        model: that has them.
        recorded: groups of layers and their steps.
        layers: all of them, by name.
        without: by layer.

    Returns:
        By layer, for those where both are known, the mean over channels of the logarithm of the ratio of variances.
        Nothing where layers differ that have no dropout before them: the training step has changed its inputs, say by
        mixing them, and nobody knows what dropout adds to that.
    """
    training: dict[str, tuple[Tensor, Tensor]] = {}
    for group, steps in recorded:
        channels = group.recorder.channels
        parts = zip(torch.split(steps.mean[-1], channels), torch.split(steps.var[-1], channels), strict=True)
        for name, calls, (mean, var) in zip(group.names, steps.calls[-1].tolist(), parts, strict=True):
            # What was seen is this rank's input of one call: a synchronized or a repeated batch is another one.
            if name in without and calls == 1 and not is_synchronized(layers[name]):
                values = float(without[name].count)
                training[name] = (mean, var * ((values - 1) / values))
    if not training:
        return {}
    shifts = dropout_variance_shift(training, without)
    means = {name: float(shift.mean()) for name, shift in shifts.items()}
    known = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if any(not dropout_before(model, layers[name]) for name in worth_a_word(known)):
        return {}
    return known


def worth_a_word(shifts: Mapping[str, float]) -> dict[str, float]:
    """Ratio of the variances of those layers where dropout changes it by enough."""
    return {name: math.exp(value) for name, value in shifts.items() if abs(value) > math.log(DROPOUT_RATIO)}


def dropout_before(model: nn.Module, layer: _BatchNorm) -> str:
    """The last active dropout that is registered before a layer, in words; nothing where there is none."""
    last = ""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0 and module.training:
            last = f" ({name.replace('_orig_mod.', '')!r}, p={module.p:g}, comes before it)"
        if module is layer:
            break
    return last
