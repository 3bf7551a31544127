"""Which of a model's layers a recalibration is for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.layers import batch_norm_layers, tracks_statistics
from bnkit.norms import Variant

__all__ = ["choose_targets", "trains_by_statistics"]


def choose_targets(
    model: nn.Module, frozen: Collection[str] | None, process_group: dist.ProcessGroup | None
) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The layers to recalibrate, and why the others are kept, if all ranks agree on them.

    Ranks with other layers would wait for each other, or pool what does not belong together.
    """
    failure: Exception | None = None
    targets: dict[str, _BatchNorm] = {}
    kept: dict[str, str] = {}
    try:
        targets, kept = _choose(model, batch_norm_layers(model), frozen)
    except (TypeError, ValueError) as error:
        failure = error
    mine = {name: layer.num_features for name, layer in targets.items()}
    theirs = ranks.all_gather_object((failure is not None, mine), process_group)
    if failure is not None:
        raise failure
    for rank, (failed, other) in enumerate(theirs):
        if failed:
            raise RuntimeError(f"Recalibration was given up because rank {rank} refused its model: see its error.")
        different = sorted(name for name in {*theirs[0][1], *other} if theirs[0][1].get(name) != other.get(name))
        if different:
            raise ValueError(
                f"The ranks disagree on what to recalibrate: rank 0 and rank {rank} differ in {different} (missing or "
                "frozen on one of them, or of other channels): build the same model in the same modes on every rank."
            )
    return targets, kept


def trains_by_statistics(layer: _BatchNorm) -> bool:
    """Whether a training forward of the layer normalises by its running statistics."""
    return isinstance(layer, Variant) and layer.trains_by_statistics


def _choose(
    model: nn.Module, found: Mapping[str, _BatchNorm], frozen: Collection[str] | None
) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The layers to recalibrate, and why the others are kept."""
    if not found:
        raise ValueError(f"{type(model).__name__} has no BatchNorm layers to recalibrate.")
    unknown = sorted(set(frozen or ()) - set(found))
    if unknown:
        raise ValueError(f"frozen names {unknown}, which are no BatchNorm layers of the model: it has {list(found)}.")
    if frozen is None:
        frozen = {name for name, layer in found.items() if model.training and not layer.training}
    targets, kept = {}, {}
    for name, layer in found.items():
        if not tracks_statistics(layer):
            kept[name] = "it does not track running statistics"
        elif name in frozen or (isinstance(layer, Variant) and layer.holds_statistics):
            kept[name] = "frozen"
        else:
            targets[name] = layer
    return targets, kept
