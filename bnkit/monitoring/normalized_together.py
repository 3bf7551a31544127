"""How many samples a layer normalises together, and how many it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import harmonic_mean

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.monitoring.snapshot import LayerMeasures
from bnkit.norms import Variant, process_groups
from bnkit.shift import normalization_batch_size

__all__ = ["is_synchronized", "with_batch_size"]


def is_synchronized(layer: _BatchNorm) -> bool:
    """Whether the layer normalises by the batches of several ranks."""
    return _ranks_together(layer) > 1


def with_batch_size(
    layer: _BatchNorm, measures: LayerMeasures, batches: Sequence[int], noise_level: float
) -> LayerMeasures:
    """The measures with the noise of what is normalised together, and the batch size that it calls for.

    Args:
        layer: the layer.
        measures: its measures, with the noise of the mean of all that it has seen in a step.
        batches: samples in this rank's batches; none: not known, and then nothing is told.
        noise_level: see [`bnkit.Monitor`][].
    """
    if not batches:
        return measures._replace(noise=math.nan) if _parts(layer, 2**30) > 1 else measures
    samples = harmonic_mean(batches)  # the mean square of the noise goes with the mean of 1 / samples
    size = normalization_batch_size(torch.tensor(measures.noise), samples * _ranks_together(layer), noise_level)
    noise = measures.noise * math.sqrt(_parts(layer, round(samples)))
    return measures._replace(noise=noise, normalization_batch_size=float(size))


def _parts(layer: _BatchNorm, samples: int) -> int:
    return layer.parts_of(samples) if isinstance(layer, Variant) else 1


def _ranks_together(layer: _BatchNorm) -> int:
    """How many ranks' batches the layer normalises together."""
    if isinstance(layer, nn.SyncBatchNorm):
        return ranks.world_size(layer.process_group)
    if isinstance(layer, Variant) and layer.waits_for_ranks:
        group = process_groups.subgroup(layer.spec.group_size)
        return 1 if group is None else ranks.world_size(group)
    return 1
