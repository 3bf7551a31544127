"""The inputs of layers that compute no batch statistics of their own, reduced at some steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.moments import Moments, to_float64
from bnkit.monitoring.charts import staleness
from bnkit.observation import Reading, reading
from bnkit.shift import Shift, dead_channels, shift

__all__ = ["InputSample", "InputSampler", "nonfinite_since", "stale_statistics"]


ENOUGH = 10
"""Samples that a layer's noise is well enough known from."""


class InputSample(NamedTuple):
    """One layer's input at one step against its running statistics; per channel, (C,), float64.

    Attributes:
        shift: of the input, with its unbiased variance.
        noise_squared: sampling variance of the batch's mean, from the scatter of its samples' means, in the unit of
            the shift; NaN for a batch of one sample.
        dead: whether the channel is.
        reference: mean and variance that it was compared with, (2, C).
        at: the step's position, as given to ``InputSampler.open``.
    """

    shift: Shift
    noise_squared: Tensor
    dead: Tensor
    reference: Tensor
    at: int


class InputSampler:
    """Reduces the inputs of layers between ``open`` and ``close``, by hooks that are gone afterwards.

    Args:
        layers: by name, each with running statistics to compare with.
        keep: of each layer at most so many samples.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], keep: int = 30) -> None:
        self.layers = dict(layers)
        self.samples: dict[str, list[InputSample]] = {name: [] for name in layers}
        self._keep = keep
        self._at = 0
        self._seen: dict[str, Moments] = {}
        self._noise: dict[str, Tensor] = {}
        self._references: dict[str, Moments] = {}
        self._hooks = ExitStack()

    @property
    def has_enough(self) -> bool:
        """Whether each layer has samples enough to tell its noise."""
        return all(len(samples) >= ENOUGH for samples in self.samples.values())

    def open(self, at: int) -> None:
        """Hook the layers, and keep what their running statistics are before the step; replaces an open one."""
        self._hooks.close()
        self._seen, self._noise, self._at = {}, {}, at
        self._references = {
            name: Moments(torch.tensor(1), layer.running_mean.clone(), layer.running_var.clone())
            for name, layer in self.layers.items()
            if layer.running_mean is not None and layer.running_var is not None
        }
        self._hooks.enter_context(reading(self.layers, self._record, by_input=lambda _: True))

    def close(self) -> None:
        """Take the hooks away, and compare what was seen; without ``open`` before it, it does nothing."""
        self._hooks.close()
        for name, observed in self._seen.items():
            layer, reference = self.layers[name], self._references[name].to(observed.mean.device)
            # Unbiased, as the running variance is.
            unbiased = observed.var * (observed.count / (observed.count - 1).clamp_min(1))
            self.samples[name].append(
                InputSample(
                    shift(Moments(observed.count, observed.mean, unbiased), reference, layer.eps),
                    self._noise[name].to(reference.var) / (reference.var + layer.eps),
                    dead_channels(observed, layer.weight, layer.bias, layer.eps),
                    torch.stack([reference.mean, reference.var]),
                    self._at,
                )
            )
            del self.samples[name][: -self._keep]
        self._seen = {}

    def forget_outdated(self) -> None:
        """Drop what was compared with other running statistics than the last: somebody has written new ones."""
        for samples in self.samples.values():
            if samples:
                last = samples[-1].reference
                samples[:] = [sample for sample in samples if torch.equal(sample.reference, last)]

    def state(self) -> dict[str, list[tuple[Tensor, int]]]:
        """The samples, for a checkpoint; see ``restore``."""
        return {
            name: [
                (
                    torch.stack(
                        [*sample.shift, sample.noise_squared, sample.dead.to(torch.float64), *sample.reference]
                    ),
                    sample.at,
                )
                for sample in samples
            ]
            for name, samples in self.samples.items()
        }

    def restore(self, state: Mapping[str, Sequence[tuple[Tensor, int]]]) -> None:
        """Go on from a ``state``, for the layers that are here."""
        for name in self.samples:
            self.samples[name] = [
                InputSample(Shift(rows[0], rows[1]), rows[2], rows[3] > 0, rows[4:], at)
                for rows, at in state.get(name, ())
            ]

    @torch.no_grad()
    def _record(self, name: str, read: Reading, x: Tensor) -> None:
        moments = Moments(torch.tensor(read.values), to_float64(read.mean), to_float64(read.var))
        self._seen[name] = self._seen[name] + moments if name in self._seen else moments
        # Samples are independent of each other, if their pixels are not.
        means = to_float64(x.flatten(2).mean(-1) if x.ndim > 2 else x)
        self._noise[name] = means.var(0) / len(means)


def nonfinite_since(samples: Mapping[str, Sequence[InputSample]], begin: int) -> dict[str, int]:
    """Layers with NaN or Inf in an input of this position or later: layer -> position of the first."""
    return {
        name: next(sample.at for sample in kept if sample.at >= begin and not bool(_is_finite(sample)))
        for name, kept in samples.items()
        if any(sample.at >= begin and not bool(_is_finite(sample)) for sample in kept)
    }


def stale_statistics(
    samples: Mapping[str, Sequence[InputSample]], rate: float
) -> dict[str, tuple[float, float, float]]:
    """Layers whose running statistics are off for good: layer -> score, bias and noise; see ``staleness``."""
    found = {}
    for name, kept in samples.items():
        if kept:
            shifts = torch.stack([sample.shift.mean for sample in kept]).cpu()
            noise = torch.stack([sample.noise_squared for sample in kept]).cpu()
            known = shifts.isfinite().all(1)
            found[name] = staleness(shifts[known], noise[known], rate)
    return {name: scores for name, scores in found.items() if scores[0] > 1}


def _is_finite(sample: InputSample) -> Tensor:
    return (sample.shift.mean.isfinite() & sample.shift.variance_ratio.isfinite()).all()
