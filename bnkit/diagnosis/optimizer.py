"""BN4xx: do the optimizer and the averaging of weights do what they are thought to do?"""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim.swa_utils import AveragedModel

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.rule import Found, rule
from bnkit.layers import batch_norm_layers


@rule(
    "BN401",
    "info",
    "weight decay on BatchNorm's weight and bias",
    needs="optimizer",
    cause="Decay pulls the scale of every channel towards 0; recipes for large batches leave BatchNorm and biases out "
    "(He et al. 2019, section 3.1).",
    cure='Give the optimizer two groups: [{"params": others}, {"params": batch_norm_parameters, "weight_decay": 0}], '
    "with the parameters of bnkit.layers.batch_norm_layers(model).values().",
)
def decayed(case: Case) -> Iterator[Found]:
    """A parameter of a layer in a group with weight_decay > 0."""
    decay = {
        id(parameter): float(group.get("weight_decay") or 0)
        for optimizer in case.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {
        name: rate
        for name, layer in case.layers.items()
        if (rate := max((decay.get(id(p), 0) for p in layer.parameters(False) if p.requires_grad), default=0)) > 0
    }
    if found:
        yield Found(list(found), f"The optimizer decays weight and bias of the layer (by {max(found.values()):g}).")


@rule(
    "BN402",
    "warning",
    "parameters that no optimizer has",
    needs="optimizer",
    cause="They have requires_grad=True and get gradients, but nothing ever takes a step.",
    cure="Add them to the optimizer, which may have been made before the layer was; or set requires_grad=False.",
)
def not_optimized(case: Case) -> Iterator[Found]:
    """requires_grad without an optimizer."""
    if not case.optimizers:
        return
    known = {
        id(parameter)
        for optimizer in case.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = [
        name
        for name, layer in case.layers.items()
        if any(p.requires_grad and id(p) not in known for p in layer.parameters(False))
    ]
    if found:
        yield Found(
            found, "Weight or bias of the layer have requires_grad=True, but are in no optimizer: they stay put."
        )


@rule(
    "BN403",
    "warning",
    "averaged weights with the statistics of others",
    cause="AveragedModel with use_buffers=False averages the weights and leaves the running statistics those of the "
    "day that it was made: no batch was ever normalised under the averaged weights.",
    cure="bnkit.recalibrate(averaged_model, loader) before it is evaluated or saved, in Lightning "
    "BatchNormRecalibration.",
)
def stale_average(case: Case) -> Iterator[Found]:
    """An AveragedModel whose buffers stay as they were, unless a sample tells that they fit."""
    found = _of_averages(case, use_buffers=False)
    if found:
        yield Found(found, "The weights are an average, and the running statistics are those of before it began.")


@rule(
    "BN404",
    "info",
    "averaged statistics for averaged weights",
    cause="The average of the running statistics is not what the averaged weights would have: it fits where the "
    "weights move slowly.",
    cure="bnkit.recalibrate(averaged_model, loader) before it is evaluated or saved, in Lightning "
    "BatchNormRecalibration.",
)
def averaged_buffers(case: Case) -> Iterator[Found]:
    """An AveragedModel with use_buffers=True, unless a sample tells that the statistics fit."""
    found = _of_averages(case, use_buffers=True)
    if found:
        yield Found(found, "Weights and running statistics are averaged alike; nobody has measured whether they fit.")


def _of_averages(case: Case, *, use_buffers: bool) -> list[str]:
    """The layers whose averages' statistics nobody has measured."""
    if case.recalibrates:
        return []
    if any(average.use_buffers is use_buffers for average in case.averages):
        return list(case.learning())
    if case.run is not None:
        return []  # the averaged model itself was measured
    averages = [m for m in case.model.modules() if isinstance(m, AveragedModel) and m.use_buffers is use_buffers]
    begun = [average for average in averages if int(average.n_averaged) > 0]
    inside = {layer for average in begun for layer in batch_norm_layers(average).values()}
    return [name for name in case.remembering() if case.layers[name] in inside]
