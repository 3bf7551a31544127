"""BN2xx: are the running statistics ones to normalise by?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.rule import Found, rule

MOST_DEAD = 0.5
"""A layer in which so many channels are dead has failed; fewer, pretrained networks have."""
EPS = (1e-10, 1e-2)
"""eps that are in use lie well within: 1e-8 to 1e-3 (TensorFlow)."""


@rule(
    "BN201",
    "error",
    "running statistics that are not finite",
    cause="One NaN or Inf in a batch stays in the running average for ever, and inference gives NaN.",
    cure="Find the batch or the weight that is not finite, then bnkit.recalibrate(model, loader), which replaces the "
    "statistics whole.",
)
def not_finite(case: Case) -> Iterator[Found]:
    """NaN or Inf in a buffer."""
    bad = [name for name in case.remembering() if not all(bool(t.isfinite().all()) for t in _pair(case, name))]
    if bad:
        yield Found(bad, "The running statistics hold NaN or Inf, so that inference gives NaN.")


@rule(
    "BN202",
    "error",
    "a negative running variance",
    cause="No average of variances is negative: the statistics were computed with cancellation, or mapped to the wrong "
    "keys; inference takes the root of it.",
    cure="bnkit.recalibrate(model, loader), which cannot give one.",
)
def negative_variance(case: Case) -> Iterator[Found]:
    """A running variance below 0."""
    bad = {name: float(var.min()) for name in case.remembering() if bool(((var := _pair(case, name)[1]) < 0).any())}
    if bad:
        yield Found(list(bad), f"The running variance is negative, down to {min(bad.values()):.2g}.")


@rule(
    "BN203",
    "warning",
    "running statistics that were never updated",
    cause="Mean 0 and variance 1 are what a layer begins with: by them nothing is normalised.",
    cure="bnkit.recalibrate(model, loader) before the model is evaluated, saved or frozen; if they came from a "
    "checkpoint, load its buffers too.",
)
def never_updated(case: Case) -> Iterator[Found]:
    """0 and 1 in a layer that is frozen, in a model for inference, or beside layers that have learnt."""
    untouched = [name for name in case.remembering() if case.is_untouched(name)]
    if case.run is not None:
        untouched = [name for name in untouched if name in case.run.reached]
    if not untouched:
        return
    others_have_learnt = any(not case.is_untouched(name) for name in case.remembering())
    found = [
        name
        for name in untouched
        if case.is_frozen(name) or not case.model.training or others_have_learnt or _has_learnt(case.layers[name])
    ]
    if found:
        why = (
            "while other layers have learnt theirs"
            if others_have_learnt
            else "though the model is in evaluation mode"
            if not case.model.training
            else "and training normalises by them"
            if any(map(case.is_frozen, found))
            else "though weight and bias have learnt"
        )
        yield Found(found, f"The running statistics are still mean 0 and variance 1, {why}: they normalise nothing.")


@rule(
    "BN204",
    "warning",
    "a layer of dead channels",
    cause="Where the variance is next to 0 the input is constant: what comes before is dead, and the division by "
    "almost 0 blows up whatever comes by after all.",
    cure="Look at what comes before the layer (a ReLU that lets nothing through, weights decayed or pruned to 0), and "
    "initialise it anew; bnkit.Monitor tells when it begins.",
)
def mostly_dead(case: Case) -> Iterator[Found]:
    """No variance in half of the channels or more."""
    dead = {name: share for name in case.remembering() if (share := _dead_share(case, name)) >= MOST_DEAD}
    if dead:
        worst = max(dead, key=lambda name: dead[name])
        yield Found(list(dead), f"{dead[worst]:.0%} of the channels of {worst!r} have a running variance of almost 0.")


@rule(
    "BN205",
    "info",
    "some dead channels",
    cause="They carry nothing, as in many pretrained networks; when the model is trained on, they may wake and be "
    "scaled up by 1 / sqrt(eps).",
    cure="Nothing, unless it is trained on other data: then watch it with bnkit.Monitor, or recalibrate first.",
)
def some_dead(case: Case) -> Iterator[Found]:
    """No variance in some channels."""
    dead = {name: share for name in case.remembering() if 0 < (share := _dead_share(case, name)) < MOST_DEAD}
    if dead:
        number = sum(round(share * case.layers[name].num_features) for name, share in dead.items())
        total = sum(layer.num_features for layer in case.layers.values())
        yield Found(list(dead), f"{number} of {total:,} channels have a running variance of almost 0.")


@rule(
    "BN206",
    "info",
    "no running statistics",
    cause="Inference normalises by the batch too: a prediction depends on the others in its batch.",
    cure="Nothing, if it is meant; else track_running_stats=True and bnkit.recalibrate(model, loader), or a "
    "normalization by the sample: bnkit.norms.Group(32).",
)
def no_statistics(case: Case) -> Iterator[Found]:
    """track_running_stats=False from the start."""
    found = [n for n, layer in case.layers.items() if layer.running_mean is None and not case.by_sample(n)]
    if found:
        yield Found(found, "The layer has no running statistics, so that inference depends on what is in the batch.")


@rule(
    "BN207",
    "warning",
    "running statistics of half precision",
    cause="With the 8 bits of bfloat16, or the 11 of float16, an average whose steps are a tenth of the difference "
    "stops short of it.",
    cure="Keep BatchNorm in float32 (layer.float(), which mixed precision does by itself), then "
    "bnkit.recalibrate(model, loader).",
)
def half_precision(case: Case) -> Iterator[Found]:
    """Buffers of bfloat16 or float16 that are to be updated."""
    dtypes = {n: layer.running_var.dtype for n, layer in case.layers.items() if layer.running_var is not None}
    half = {n: dtype for n, dtype in dtypes.items() if dtype in (torch.float16, torch.bfloat16)}
    found = [name for name in case.learning() if name in half and case.layers[name].training]
    if found:
        dtype = str(half[found[0]]).removeprefix("torch.")
        yield Found(found, f"The running statistics are {dtype}, too coarse to average in: they are per cents off.")


@rule(
    "BN208",
    "warning",
    "an eps out of the usual range",
    cause="It is added to the variance: too small, a constant channel divides by 0; too large, nothing is normalised.",
    cure="Set eps to 1e-5, or to 1e-3 for weights that come from TensorFlow.",
)
def unusual_eps(case: Case) -> Iterator[Found]:
    """An eps outside 1e-10 to 1e-2."""
    odd = {name: layer.eps for name, layer in case.layers.items() if not EPS[0] <= layer.eps <= EPS[1]}
    for eps in dict.fromkeys(odd.values()):
        yield Found([name for name, e in odd.items() if e == eps], f"eps={eps:g}; in use are 1e-5 to 1e-3.")


def _pair(case: Case, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    pair = case.statistics[name]
    assert pair is not None
    return pair


def _dead_share(case: Case, name: str) -> float:
    """The fraction of the channels whose variance is nothing beside eps; those below 0 are told otherwise."""
    var = _pair(case, name)[1]
    return float(((var >= 0) & (var < 1e-3 * case.layers[name].eps)).double().mean())


def _has_learnt(layer: _BatchNorm) -> bool:
    """Whether the bias, which all initialisations make constant, differs from channel to channel."""
    bias: torch.Tensor | None = layer.bias
    return bias is not None and not bias.is_meta and bool((bias != bias[:1]).any())
