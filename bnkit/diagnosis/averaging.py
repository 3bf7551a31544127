"""BN2xx: do the running statistics follow training as they should?"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.rule import Found, rule

LITTLE_MEMORY = 0.5
"""A momentum from which on the last batch counts for as much as all before it."""
LONG_MEMORY = 1e-3
"""A momentum below which the average looks back over more than a thousand batches."""


@rule(
    "BN211",
    "warning",
    "a momentum that remembers almost nothing",
    cause="In torch momentum is the weight of the new batch: TensorFlow's 0.9 and 0.99 are torch's 0.1 and 0.01.",
    cure="Set momentum to 1 minus the value of TensorFlow, Keras or JAX, mostly 0.1 or 0.01; or measure the "
    "statistics: bnkit.recalibrate, in Lightning BatchNormRecalibration.",
)
def short_memory(case: Case) -> Iterator[Found]:
    """A momentum of 0.5 or more, or none that there can be."""
    found = {name: m for name in case.learning() if (m := _momentum(case, name)) is not None}
    short = {name: m for name, m in found.items() if m >= LITTLE_MEMORY or m < 0}
    for value in dict.fromkeys(short.values()):
        names = [name for name, m in short.items() if m == value]
        if 0 <= value <= 1:
            yield Found(
                names,
                f"With momentum={value:g} the last batch makes up {value:.0%} of the running statistics: they are as "
                "noisy as one batch (the opposite of the same number in TensorFlow).",
            )
        else:
            yield Found(
                names,
                f"momentum={value:g} is outside 0 to 1: the running statistics are no average.",
                "Set momentum to a value between 0 and 1, mostly 0.1.",
            )


@rule(
    "BN212",
    "warning",
    "a momentum that learns almost nothing",
    cause="The running average looks back over 1 / momentum batches, in which the weights have moved on.",
    cure="Set momentum to 0.1 or 0.01, or measure the statistics: bnkit.recalibrate, in Lightning "
    "BatchNormRecalibration; to keep them on purpose swap to bnkit.norms.Frozen().",
)
def long_memory(case: Case) -> Iterator[Found]:
    """A momentum below 0.001."""
    found = {name: m for name in case.learning() if (m := _momentum(case, name)) is not None and 0 <= m < LONG_MEMORY}
    for value in dict.fromkeys(found.values()):
        reach = (
            f"the running statistics look back over about {1 / value:,.0f} batches" if value else "they never change"
        )
        why = "while training normalises by the batch" if not value else "under weights that are no more"
        yield Found([name for name, m in found.items() if m == value], f"With momentum={value:g} {reach}, {why}.")


@rule(
    "BN213",
    "warning",
    "a cumulative average",
    cause="With momentum=None all batches since the first weigh alike, those under the first weights too.",
    cure="Set momentum to 0.1, or measure the statistics of the weights as they are: bnkit.recalibrate, in Lightning "
    "BatchNormRecalibration.",
)
def cumulative(case: Case) -> Iterator[Found]:
    """momentum=None."""
    found = [name for name in case.learning() if case.layers[name].momentum is None]
    if found:
        yield Found(
            found,
            "momentum=None makes the running statistics the mean over all batches so far, which lags behind weights "
            "that learn.",
        )


@rule(
    "BN214",
    "warning",
    "running statistics that stand still while training normalises by the batch",
    cause="Setting track_running_stats=False on a layer that has buffers, as Lightning's BaseFinetuning.freeze leaves "
    "it, stops the average and not the normalization by the batch: training and inference go apart.",
    cure="To freeze the layer swap it to bnkit.norms.Frozen(), or call its eval() after every train(); else set "
    "track_running_stats=True.",
)
def half_frozen(case: Case) -> Iterator[Found]:
    """track_running_stats=False with buffers, in training mode."""
    found = [
        name
        for name in case.by_batch()
        if case.layers[name].running_mean is not None
        and not case.layers[name].track_running_stats
        and case.layers[name].training
    ]
    if found:
        yield Found(
            found,
            "track_running_stats is False, so that the running statistics stand still, but training normalises by the "
            "batch all the same.",
        )


@rule(
    "BN215",
    "warning",
    "statistics that move in a part whose parameters are frozen",
    cause="Setting requires_grad=False stops the parameters and not the running statistics: the frozen part changes "
    "with every batch.",
    cure="Swap the part to bnkit.norms.Frozen(), or call eval() on it after every train(); nothing, if adapting its "
    "statistics is meant.",
)
def moving_statistics(case: Case) -> Iterator[Found]:
    """Nothing learns in the layer and just before it, but elsewhere, and the statistics follow the batches."""
    if not case.model.training or not any(p.requires_grad for p in case.model.parameters()):
        return
    found = [name for name in case.learning() if _learns_nothing(case, name)]
    if found:
        yield Found(
            found,
            "The parameters of the layer, and of what comes before it, are frozen (requires_grad=False), but the "
            "layer is in training mode: its running statistics change, and it normalises by the batch.",
        )


def _momentum(case: Case, name: str) -> float | None:
    momentum = case.layers[name].momentum
    return None if momentum is None else float(momentum)


def _learns_nothing(case: Case, name: str) -> bool:
    """Whether neither the layer nor the last layer with parameters before it has any that learn."""
    layer = case.layers[name]
    if any(p.requires_grad for p in layer.parameters(recurse=False)):
        return False
    before = case.before.get(name)
    if before is not None and before.modules and all(list(m.parameters(recurse=False)) for m in before.modules):
        sources: list[nn.Module] = list(before.modules)
    else:
        earlier: list[nn.Module] = []
        for module in case.model.modules():
            if module is layer:
                break
            if list(module.parameters(recurse=False)) and not isinstance(module, _BatchNorm):
                earlier.append(module)
        sources = earlier[-1:]
    return bool(sources) and not any(p.requires_grad for m in sources for p in m.parameters(recurse=False))
