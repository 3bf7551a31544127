"""BN3xx: does BatchNorm stand where it can do its work?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bnkit.diagnosis.case import Case, rms
from bnkit.diagnosis.rule import Found, rule
from bnkit.diagnosis.sample import Call
from bnkit.moments import Moments
from bnkit.monitoring.alarms import DROPOUT_RATIO
from bnkit.norms import Domain, Ghost, Sync, original_class, spec_of
from bnkit.probes import dropout_variance_shift
from bnkit.shift import shift
from bnkit.swapping import why_unknown

APART = 0.5
"""Calls of a shared layer whose means lie so far apart, in standard deviations, need statistics of their own."""
BEYOND_NOISE = 4.0
"""So many times what chance explains."""


@rule(
    "BN301",
    "warning",
    "dropout before BatchNorm",
    cause="Dropout adds variance in training, which the running variance learns, and inference has no dropout (Li et "
    "al. 2018).",
    cure="Put dropout after the last BatchNorm, or recalibrate before evaluating, which switches it off: "
    "bnkit.recalibrate(model, loader), in Lightning BatchNormRecalibration.",
)
def dropout_before(case: Case) -> Iterator[Found]:
    """By its effect on a sample's variance where there is one, else by the data flow."""
    exposed = [name for name in case.by_batch() if name in set(case.remembering())]
    if case.run is not None and case.run.gap is not None:
        yield from _measured_dropout(case, exposed)
        return
    found = {name: case.before[name].dropouts for name in exposed if name in case.before}
    found = {name: dropouts for name, dropouts in found.items() if dropouts}
    if found:
        first = next(iter(found))
        last = found[first][0]
        yield Found(
            list(found),
            f"Dropout ({last.name}, p={last.p:g}) comes before {first!r}, with no other BatchNorm in between: the "
            "running variance learns what dropout adds, and inference has none of it.",
        )


def _measured_dropout(case: Case, exposed: list[str]) -> Iterator[Found]:
    assert case.run is not None
    assert case.run.gap is not None
    met = {name: Moments.pool([c.moments for c in case.run.calls[name]]) for name in exposed if name in case.run.calls}
    met = {name: moments for name, moments in met.items() if name in case.run.gap.seen}
    if not met:
        return
    ratios = {
        name: math.exp(mean)
        for name, log in dropout_variance_shift(met, case.run.gap.seen).items()
        if math.isfinite(mean := float(log.mean())) and abs(mean) > math.log(DROPOUT_RATIO)
    }
    before = case.run.dropouts_before
    traced = {name for name, known in case.before.items() if known.dropouts}
    found = {name: ratio for name, ratio in ratios.items() if before.get(name) or name in traced}
    if found:
        worst = max(found, key=lambda name: abs(math.log(found[name])))
        which = repr(before[worst][-1]) if before.get(worst) else case.before[worst].dropouts[0].name
        yield Found(
            list(found),
            f"Dropout ({which}) comes before {worst!r}, which meets {found[worst]:.3g} times the variance that it "
            "would without: the running variance learns that, and inference has no dropout.",
        )


@rule(
    "BN302",
    "info",
    "a bias that BatchNorm takes off again",
    cause="Training subtracts the batch's mean, and with it any bias of the convolution or linear layer right before: "
    "the bias learns nothing and costs memory.",
    cure="Give that convolution or linear layer bias=False; a trained model computes the same with it.",
)
def useless_bias(case: Case) -> Iterator[Found]:
    """A convolution or linear layer with a bias, whose output goes to a layer by the batch and nowhere else."""
    users: dict[nn.Module, list[str]] = {}
    for name, before in case.before.items():
        for module in before.modules:
            users.setdefault(module, []).append(name)
    plain = {n for n in case.by_batch() if n in case.before and case.before[n].alone and _takes_the_mean_off(case, n)}
    sources = {
        module: names
        for module, names in users.items()
        if isinstance(module, _ConvNd | nn.Linear)
        and isinstance(module.bias, nn.Parameter)
        and module.bias.requires_grad
        and plain.issuperset(names)
    }
    found = list(dict.fromkeys(name for names in sources.values() for name in names))
    if found:
        kinds = " or ".join(dict.fromkeys(f"a {type(module).__name__}" for module in sources))
        yield Found(
            found,
            f"Right before the layer stands {kinds} with a bias, which subtracting the batch's mean takes off again.",
        )


@rule(
    "BN303",
    "warning",
    "a shared layer whose calls differ",
    needs="sample",
    cause="Training normalises each call by its own statistics, but one pair of running statistics has to serve them "
    "all.",
    cure="Give each call a BatchNorm of its own (what is around it may stay shared), swap to "
    "bnkit.norms.Domain(names) and choose the domain at each call, or to Group(32).",
)
def shared_layer(case: Case) -> Iterator[Found]:
    """Several calls in one forward, whose statistics differ by more than chance and enough to matter."""
    if case.run is None:
        return
    exposed = set(case.remembering()) & set(case.by_batch())
    apart = {
        name: max(_distance(a, b, case.layers[name].eps) for a, b in pairwise(calls))
        for name, calls in case.run.calls.items()
        if name in exposed and len(calls) > 1 and not isinstance(spec_of(case.layers[name]), Domain)
    }
    apart = {name: distance for name, distance in apart.items() if distance > APART}
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        yield Found(
            list(apart),
            f"{worst!r} is called {len(case.run.calls[worst])} times in a forward, and its inputs lie up to "
            f"{apart[worst]:.2g} standard deviations apart: no one mean fits them at inference.",
        )


@rule(
    "BN304",
    "info",
    "a layer that no forward reaches",
    needs="sample",
    cause="Its running statistics stay what they are, whatever the rest learns.",
    cure="Nothing, if another forward uses it; else remove it; forward= says how the model is run.",
)
def unreached(case: Case) -> Iterator[Found]:
    """Neither in training nor in evaluation mode."""
    if case.run is None or case.run.single_value is not None:
        return
    found = [name for name in case.layers if name not in case.run.reached]
    if found:
        yield Found(found, "The sample went through the model without reaching the layer, in either mode.")


@rule(
    "BN305",
    "info",
    "a layer of a class that bnkit does not know",
    cause="It is taken for batch normalization and cannot be swapped: what else its forward does is not known.",
    cure="Say what it does by bnkit.register_adapter(layer_class, ...); recalibration and monitoring work without.",
)
def unknown_class(case: Case) -> Iterator[Found]:
    """A subclass of BatchNorm with no adapter."""
    unknown = {
        name: original_class(layer)
        for name, layer in case.layers.items()
        if not isinstance(layer, nn.SyncBatchNorm) and why_unknown(layer)
    }
    for cls in dict.fromkeys(unknown.values()):
        names = [name for name, other in unknown.items() if other is cls]
        yield Found(names, f"bnkit does not know what {cls.__module__}.{cls.__qualname__} does beside BatchNorm.")


@rule(
    "BN306",
    "error",
    "torch's SyncBatchNorm on the CPU",
    cause="The class torch.nn.SyncBatchNorm refuses to train on a CPU, even in one process.",
    cure="Leave convert_sync_batchnorm (in Lightning sync_batchnorm=True) out and use bnkit.norms.Sync(), which works "
    "there too.",
)
def sync_on_cpu(case: Case) -> Iterator[Found]:
    """A model for training on a machine without an accelerator."""
    if not case.model.training or torch.accelerator.is_available():
        return
    found = [
        name
        for name, layer in case.layers.items()
        if type(layer) is nn.SyncBatchNorm
        and layer.training
        and any(tensor.device.type == "cpu" for tensor in (*layer.parameters(), *layer.buffers()))
    ]
    if found:
        yield Found(found, "torch.nn.SyncBatchNorm refuses to train on a CPU, and there is no other device here.")


def _takes_the_mean_off(case: Case, name: str) -> bool:
    """Whether training subtracts the batch's own mean, and nothing else depends on it."""
    spec = spec_of(case.layers[name])
    return spec is None or isinstance(spec, Ghost | Sync | Domain)


def _distance(a: Call, b: Call, eps: float) -> float:
    """How far two calls' means lie apart, in standard deviations, rms over the channels; 0 where chance explains it."""
    z = rms(shift(a.moments, b.moments, eps).mean)
    chance = math.hypot(a.noise(a.units, eps), b.noise(b.units, eps))
    return z if z > BEYOND_NOISE * chance else 0.0
