"""The measures of every recorded step, layer by layer, computed on the layers' device for many steps at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.monitoring.step_recorder import StepRecorder, Steps
from bnkit.shift import Shift, relu_zero_fraction

__all__ = ["FAST", "SLOW", "Carried", "LayerState", "StepMeasures", "StepRows"]

FAST, SLOW = 1 / 10, 1 / 100
"""Weights of a step in the two exponential averages whose difference is the drift."""
_ENOUGH = 0.39
"""Weight that the slow average must have seen before a drift is told: 50 steps."""


class StepRows(NamedTuple):
    """Measures of K steps and L layers, each (K, L); NaN where not known."""

    mean_shift_squared: Tensor
    log_variance_ratio: Tensor
    kl: Tensor
    noise_squared: Tensor
    nonfinite: Tensor  # 1 or 0
    calls: Tensor  # of the layer; 0 where it took no part or its batch could not be recovered


class LayerState(NamedTuple):
    """Measures of L layers as they are now, each (L,); NaN where not known."""

    wasserstein2: Tensor
    psi: Tensor
    drift: Tensor
    dead_fraction: Tensor
    weight: Tensor
    bias: Tensor


class Carried(NamedTuple):
    """What is carried from step to step, each (C,): sums of the fast and the slow average and the weights in them.

    And the last that is known of a batch: its variance, mean shift and variance ratio; NaN before the first.
    """

    fast: Tensor
    fast_weight: Tensor
    slow: Tensor
    slow_var: Tensor
    slow_weight: Tensor
    last: Tensor  # the batch mean of the step before; NaN where the layer took no part in that
    var: Tensor
    mean_shift: Tensor
    variance_ratio: Tensor


class StepMeasures:
    """Records some layers and measures their steps.

    Args:
        layers: by name, of one device and dtype; see ``StepRecorder``.
        capacity: steps to record at most before they are measured.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], capacity: int) -> None:
        self.names = tuple(layers)
        self.recorder = StepRecorder(list(layers.values()), capacity)
        self._layer_of = self.recorder.layer_of_channel
        like = self._like()
        self._eps = torch.tensor([layer.eps for layer in layers.values()], dtype=like.dtype).to(like)[self._layer_of]
        self._widths = torch.tensor(self.recorder.channels, dtype=like.dtype).to(like)
        zero = torch.zeros_like(self._eps)
        self._carried = Carried(*[zero] * 5, *[torch.full_like(zero, torch.nan)] * 4)
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def digest(self) -> Steps | None:
        """Measure the steps recorded since the last time; nothing waits for the device."""
        if not self.recorder.recorded:
            return None
        steps = self.recorder.take()
        known = (steps.mean + steps.var).isfinite()  # nor where the layer is not known, which is NaN
        scale = steps.running_var + self._eps
        measures = scale.new_empty(4, *scale.shape)
        z_squared, log_ratio, kl, noise = measures
        torch.div((steps.mean - steps.running_mean).square_(), scale, out=z_squared)
        ratio = (steps.var + self._eps).div_(scale)
        torch.log(ratio, out=log_ratio)
        torch.add(z_squared, ratio, out=kl).sub_(1).sub_(log_ratio).mul_(0.5).clamp_min_(0)  # Shift.kl, in place
        self._noise(steps, scale, out=noise)
        means = self._mean_of_layers(measures)
        nonfinite = steps.known & ~means[2].isfinite()
        self._rows.append(torch.cat([means, torch.stack([nonfinite, steps.calls * steps.known]).to(means.dtype)]))
        self._average(steps, known)
        self._keep_last(steps, scale, ratio, known)
        return steps

    def carried(self) -> dict[str, Tensor]:
        """What a later StepMeasures goes on from, by layer: ``Carried`` as (9, C)."""
        parts = torch.split(torch.stack(self._carried), self.recorder.channels, dim=1)
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}

    def pending(self) -> dict[str, Tensor]:
        """The steps digested since the last result, by layer: ``StepRows`` as (6, K)."""
        return {name: part.clone() for name, part in zip(self.names, self._all_rows().unbind(2), strict=True)}

    def carry(self, carried: Mapping[str, Tensor], pending: Mapping[str, Tensor]) -> None:
        """Go on from what ``carried`` and ``pending`` gave, for the layers that are in it."""
        parts = [
            carried[name].to(part) if name in carried and carried[name].shape == part.shape else part
            for name, part in self.carried().items()
        ]
        self._carried = Carried(*torch.cat(parts, dim=1).unbind())
        count = max((part.shape[1] for part in pending.values()), default=0)
        unknown = self._like().new_tensor([torch.nan] * 4 + [0.0] * 2).unsqueeze(1)
        rows = [pending[name].to(unknown) if name in pending else unknown[:, :0] for name in self.names]
        rows = [torch.cat([unknown.expand(-1, count - part.shape[1]), part], dim=1) for part in rows]
        self._rows = [torch.stack(rows, dim=2)] if count else []

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """Packed ``StepRows``, (6, K, L), of all steps digested since the last result, and ``LayerState``."""
        rows = self._all_rows()
        self._rows = []
        return rows, torch.stack(self._state(rows))

    def _all_rows(self) -> Tensor:
        none = self._like().new_empty(len(StepRows._fields), 0, len(self.names))
        return torch.cat(self._rows, dim=1) if self._rows else none

    def _state(self, rows: Tensor) -> LayerState:
        a = self._carried
        drift = (a.fast / a.fast_weight - a.slow / a.slow_weight).square() / (a.slow_var / a.slow_weight + self._eps)
        weight, bias = self._affine()
        constant = weight.abs() * (a.var / (a.var + self._eps)).sqrt() < 1e-3
        dead = constant | (relu_zero_fraction(weight, -bias) < 1e-3).to(constant)  # what a ReLU lets through
        dead = dead.to(a.var.dtype).masked_fill(~a.var.isfinite(), torch.nan)
        shift = Shift(a.mean_shift, a.variance_ratio)
        weights = a.fast_weight, a.slow_weight
        per_channel = (shift.wasserstein2, shift.psi, drift, dead, weight.square(), bias.square(), *weights)
        means = self._mean_of_layers(torch.stack(per_channel)).unbind()
        by_noise = _difference_by_noise(means[6], means[7])
        noise = StepRows(*rows).noise_squared.nanmean(0).nan_to_num()
        return LayerState(
            wasserstein2=means[0],
            psi=means[1],
            drift=(means[2] - by_noise * noise).clamp_min(0).sqrt().masked_fill(means[7] < _ENOUGH, torch.nan),
            dead_fraction=means[3],
            weight=means[4].sqrt(),
            bias=means[5].sqrt(),
        )

    def _noise(self, steps: Steps, scale: Tensor, out: Tensor) -> None:
        """Half the squared difference of successive batch means, whose drift cancels (von Neumann et al. 1941)."""
        torch.sub(steps.mean[1:], steps.mean[:-1], out=out[1:])
        torch.sub(steps.mean[0], self._carried.last, out=out[0])
        out.square_().mul_(0.5).div_(scale)

    def _average(self, steps: Steps, known: Tensor) -> None:
        a, count = self._carried, len(steps.mean)
        ages = torch.arange(count - 1, -1, -1, device=known.device, dtype=steps.mean.dtype)
        fast, slow = FAST * (1 - FAST) ** ages, SLOW * (1 - SLOW) ** ages
        weights, took_part = torch.stack([fast, slow]), known.to(steps.mean.dtype)
        if not self._all(known):
            steps = steps._replace(mean=steps.mean.masked_fill(~known, 0.0), var=steps.var.masked_fill(~known, 0.0))
        keep_fast, keep_slow = (1 - FAST) ** count, (1 - SLOW) ** count
        fast_mean, slow_mean = weights @ steps.mean
        fast_weight, slow_weight = weights @ took_part
        self._carried = a._replace(
            fast=keep_fast * a.fast + fast_mean,
            fast_weight=keep_fast * a.fast_weight + fast_weight,
            slow=keep_slow * a.slow + slow_mean,
            slow_var=keep_slow * a.slow_var + slow @ steps.var,
            slow_weight=keep_slow * a.slow_weight + slow_weight,
            last=torch.where(known[-1], steps.mean[-1], torch.nan),
        )

    def _keep_last(self, steps: Steps, scale: Tensor, ratio: Tensor, known: Tensor) -> None:
        a, kept = self._carried, (steps.var, steps.mean - steps.running_mean, scale, ratio)
        if self._all(known):
            var, difference, unit, variance_ratio = (values[-1] for values in kept)
        else:
            # Of each channel the last step that is known; what was before, where none is.
            last = torch.where(known, torch.arange(len(known), device=known.device).unsqueeze(1), -1).amax(0)
            var, difference, unit, variance_ratio = (
                values.gather(0, last.clamp_min(0).unsqueeze(0)).squeeze(0) for values in kept
            )
            var = torch.where(last >= 0, var, a.var)
            difference = torch.where(last >= 0, difference, a.mean_shift * unit.sqrt())
            variance_ratio = torch.where(last >= 0, variance_ratio, a.variance_ratio)
        self._carried = a._replace(var=var, mean_shift=difference / unit.sqrt(), variance_ratio=variance_ratio)

    @staticmethod
    def _all(known: Tensor) -> bool:
        """Whether all is known, where looking costs no synchronization."""
        return known.device.type == "cpu" and bool(known.all())

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Weights and biases of all channels; 1 and 0 where a layer has none."""
        weights = [torch.ones_like(r) if (w := layer.weight) is None else w.to(r) for layer, r in self._with_running()]
        biases = [torch.zeros_like(r) if (b := layer.bias) is None else b.to(r) for layer, r in self._with_running()]
        return torch.cat(weights), torch.cat(biases)

    def _with_running(self) -> list[tuple[_BatchNorm, Tensor]]:
        return [(layer, layer.running_mean) for layer in self.recorder.layers if layer.running_mean is not None]

    def _mean_of_layers(self, values: Tensor) -> Tensor:
        """(…, C) to (…, L): the mean over each layer's channels."""
        # Many small sums, and yet several times faster than index_add_ or segment_reduce.
        parts = torch.split(values, self.recorder.channels, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1) / self._widths

    def _like(self) -> Tensor:
        return self._with_running()[0][1]


def _difference_by_noise(fast_weight: Tensor, slow_weight: Tensor) -> Tensor:
    """Variance of the difference of the two averages of the same noise, in variances of one batch's.

    The weights that the averages have seen tell how many steps they are old.
    """
    a, b = 1 - fast_weight, 1 - slow_weight
    fast = FAST / (2 - FAST) * (1 + a) / (1 - a)
    slow = SLOW / (2 - SLOW) * (1 + b) / (1 - b)
    both = FAST * SLOW / (FAST + SLOW - FAST * SLOW) * (1 - a * b) / ((1 - a) * (1 - b))
    return fast + slow - 2 * both
