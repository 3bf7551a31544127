"""BN5xx: do the running statistics fit what a sample is normalised by?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from bnkit.diagnosis.case import Case, rms
from bnkit.diagnosis.rule import Found, rule
from bnkit.moments import Moments
from bnkit.shift import shift

ENOUGH = 8
"""Samples from which on their spread tells how well a mean is known."""
BEYOND_NOISE = 4.0
"""So many times what chance explains."""
FAR = 0.25
"""Standard deviations by which a mean has to be off to be worth a word."""
FACTOR = 2.0
"""Factor by which a variance has to be off."""
DISAGREEMENT, AT_LEAST = 0.1, 4
"""Fraction of the predictions that change, and how many of them: of a few, one or two change by chance."""
OUTPUT = 0.5
"""Difference of the outputs in their own size."""

_MEASURE = (
    "bnkit.recalibrate(model, loader) sets them to those of the data, in Lightning BatchNormRecalibration before each "
    "validation"
)


@rule(
    "BN501",
    "warning",
    "running statistics far from the sample's",
    needs="sample",
    cause="The weights have moved faster than the average follows, they were loaded or averaged without statistics, "
    "or the sample is of another kind than what the model was trained on.",
    cure=f"{_MEASURE}; to adapt to new data, prior_samples= weighs the old statistics in.",
)
def far_off(case: Case) -> Iterator[Found]:
    """By more than chance explains, as the spread between samples tells it, and by enough to matter."""
    if case.run is None or case.run.samples < ENOUGH:
        return
    off: dict[str, tuple[float, float, float]] = {}
    for name in case.remembering():
        if name in case.run.calls and case.keeps_mean(name) and (not case.is_untouched(name) or case.is_frozen(name)):
            mean, factor, times = _distance(case, name)
            if times > BEYOND_NOISE:
                off[name] = mean, factor, times
    if not off:
        return
    for frozen in (False, True):
        names = [name for name in off if case.is_frozen(name) is frozen]
        if names:
            worst = max(names, key=lambda name: off[name][2])
            mean, factor, times = off[worst]
            yield Found(
                names,
                f"The {'fixed ' * frozen}running statistics do not fit the sample: those of {worst!r} are off by "
                f"{mean:.2g} standard deviations in the mean and a factor of {factor:.2g} in the variance, {times:.2g} "
                f"times what chance explains with {case.run.samples} samples.",
                "Recalibrate before freezing (bnkit.recalibrate leaves frozen layers alone), freeze what comes before "
                "them too, or let them learn the new data."
                if frozen
                else "",
            )


@rule(
    "BN502",
    "warning",
    "a train-eval gap",
    needs="sample",
    cause="The same batch under the same weights gives other outputs by the running statistics than by its own.",
    cure=f"If the statistics are off, {_MEASURE}; if the batch is small, swap to bnkit.norms.Renorm() or Group(32).",
)
def gap(case: Case) -> Iterator[Found]:
    """A tenth of the predictions change, or the output by half its size where there are none."""
    run = case.run
    if run is None or run.gap is None or run.samples < ENOUGH:
        return
    used = [name for name in case.remembering() if name in run.calls and not case.is_frozen(name)]
    if not used or all(case.is_untouched(name) for name in used):
        return  # nothing has been learnt yet
    changed, output = run.gap.disagreement, run.gap.output
    if changed is not None and changed >= max(DISAGREEMENT, AT_LEAST / run.samples):
        yield Found(
            (), f"{changed:.0%} of the predictions on the sample change from the batch's to the running statistics."
        )
    elif changed is None and output is not None and output >= OUTPUT:
        yield Found((), f"The output changes by {output:.0%} of its size from the batch's to the running statistics.")


def _distance(case: Case, name: str) -> tuple[float, float, float]:
    """How far mean (standard deviations) and variance (a factor) are off, and how many times what chance explains.

    The last is 0 where it is not enough to matter.
    """
    assert case.run is not None
    layer, calls, pair = case.layers[name], case.run.calls[name], case.statistics[name]
    assert pair is not None
    if not all(bool(tensor.isfinite().all()) for tensor in pair):
        return 0.0, 1.0, 0.0  # told otherwise
    running = Moments(torch.tensor(1), pair[0], pair[1].clamp_min(0))
    here = shift(Moments.pool([call.moments for call in calls]), running, layer.eps)
    units = sum(call.units for call in calls)
    # What chance explains of the difference: the sample's own scatter, and that of an average over batches.
    momentum = 0.0 if layer.momentum is None or case.is_frozen(name) else min(max(float(layer.momentum), 0.0), 1.0)
    share = 1 / units + momentum / (2 - momentum) / (case.batch_size or case.run.samples)
    spread = torch.stack([call.mean_spread for call in calls]).mean(0)
    squares = torch.stack([call.var_spread for call in calls]).mean(0)
    scale = running.var + layer.eps
    own = torch.stack([call.var for call in calls]).mean(0) + layer.eps
    mean, mean_noise = rms(here.mean), rms((spread * share / scale).sqrt())
    log, log_noise = rms(here.log_variance_ratio), rms((squares * share).sqrt() / own)
    mean_times = mean / mean_noise if mean > FAR and mean_noise > 0 else 0.0
    log_times = log / log_noise if log > math.log(FACTOR) and log_noise > 0 else 0.0
    return mean, math.exp(log), max(mean_times, log_times)
