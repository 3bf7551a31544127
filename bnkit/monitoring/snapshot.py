"""What a monitor says of every layer at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.moments import to_float64
from bnkit.monitoring.alarms import Alarm
from bnkit.monitoring.input_samples import InputSample
from bnkit.monitoring.step_measures import LayerState, StepRows

__all__ = ["LayerMeasures", "Snapshot", "from_samples", "from_steps", "measure_samples"]

_OF_SAMPLES = (
    *("mean_shift", "log_variance_ratio", "kl", "wasserstein2", "psi", "noise", "dead_fraction", "weight", "bias"),
    "finite",
)
"""What is measured of inputs; the first, "noise", "weight" and "bias" squared, as they average over ranks."""


class LayerMeasures(NamedTuple):
    """One layer since the last snapshot; NaN is not known.

    Attributes:
        source: ``"layer"`` (every step, from its own batch statistics), ``"input"`` (some steps, its input reduced) or
            ``"unknown: WHY"``.
        mean_shift: rms over steps and channels of the batch means against the running ones, in running standard
            deviations.
        log_variance_ratio: mean over steps and channels; 0 where batch and running variance agree.
        kl: mean over steps and channels, in nats.
        wasserstein2: of the last step, mean over channels, in running standard deviations.
        psi: of the last step, mean over channels.
        drift: fast against slow average of the batch means, rms over channels in standard deviations, less what the
            noise of the batches explains.
        noise: scatter about its drift of the mean that samples are normalised by (a batch's, or a ghost's), rms over
            channels, in running standard deviations.
        normalization_batch_size: samples to normalise together for a given noise; see [`bnkit.Monitor`][].
        dead_fraction: of the channels, see [`bnkit.shift.dead_channels`][].
        weight, bias: root mean square over the channels.
        finite: whether no batch statistic was NaN or infinite; None where not known.
    """

    source: str
    mean_shift: float = math.nan
    log_variance_ratio: float = math.nan
    kl: float = math.nan
    wasserstein2: float = math.nan
    psi: float = math.nan
    drift: float = math.nan
    noise: float = math.nan
    normalization_batch_size: float = math.nan
    dead_fraction: float = math.nan
    weight: float = math.nan
    bias: float = math.nan
    finite: bool | None = None


class Snapshot(NamedTuple):
    """All layers at a step, by name in the model's order, and the alarms raised since the last snapshot."""

    step: int
    layers: dict[str, LayerMeasures]
    alarms: tuple[Alarm, ...]


def from_steps(names: Sequence[str], rows: StepRows, state: LayerState) -> dict[str, LayerMeasures]:
    """Layers whose every step was recorded; rows and state on the CPU."""
    took_part = rows.calls.sum(0) > 0
    means = {field: getattr(rows, field).nanmean(0).tolist() for field in rows._fields}
    now = {field: getattr(state, field).tolist() for field in state._fields}
    return {
        name: LayerMeasures(
            source="layer",
            mean_shift=math.sqrt(means["mean_shift_squared"][i]),
            log_variance_ratio=means["log_variance_ratio"][i],
            kl=means["kl"][i],
            noise=math.sqrt(means["noise_squared"][i]),
            finite=not bool((rows.nonfinite[:, i] > 0).any()),
            **{field: values[i] for field, values in now.items()},
        )
        if bool(took_part[i])
        else LayerMeasures(
            "unknown: no step since the last snapshot could be read: it took part in none, or its buffers were replaced"
        )
        for i, name in enumerate(names)
    }


def measure_samples(layer: _BatchNorm, samples: Sequence[InputSample]) -> Tensor:
    """What ``from_samples`` wants of a layer, one row on the layer's device; measures of the last sample."""
    if not samples:
        return torch.full((len(_OF_SAMPLES),), torch.nan, dtype=torch.float64)
    last = samples[-1].shift
    weight, bias = layer.weight, layer.bias
    finite = last.mean.isfinite() & last.variance_ratio.isfinite()
    row = (
        last.mean.square().mean(),
        last.log_variance_ratio.mean(),
        last.kl.mean(),
        last.wasserstein2.mean(),
        last.psi.mean(),
        torch.stack([sample.noise_squared for sample in samples]).mean(),
        torch.where(finite, samples[-1].dead.to(torch.float64), torch.nan).mean(),
        last.mean.new_ones(()) if weight is None else to_float64(weight).square().mean().to(last.mean.device),
        last.mean.new_zeros(()) if bias is None else to_float64(bias).square().mean().to(last.mean.device),
        finite.all().to(torch.float64),
    )
    return torch.stack(row)


def from_samples(row: Tensor) -> LayerMeasures:
    """A layer whose input was reduced at some steps; the row of ``measure_samples`` on the CPU."""
    values = dict(zip(_OF_SAMPLES, row.tolist(), strict=True))
    finite = values.pop("finite")
    if math.isnan(finite):
        return LayerMeasures("unknown: no step at which inputs are reduced has reached it")
    roots = {name: math.sqrt(values[name]) for name in ("mean_shift", "noise", "weight", "bias")}
    return LayerMeasures("input", finite=finite == 1, **(values | roots))
