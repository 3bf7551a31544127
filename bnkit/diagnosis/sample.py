"""What one batch tells: it goes through the model as in training, and by BatchNorm's two kinds of statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.diagnosis.flow import active_dropout
from bnkit.feeding import Forward, feed, known_samples_in
from bnkit.moments import Moments, to_float64
from bnkit.observation import eager
from bnkit.preservation import preserved, random_states_preserved, undoing
from bnkit.probes import GapReport, train_eval_gap
from bnkit.stand_ins import stand_ins

__all__ = ["Call", "SampleRun", "run_sample", "try_sample"]

_SLICE_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a layer normalised, and how that varies from sample to sample.

    A sample's values correlate (neighbouring pixels do), samples do not: so how well a mean is known is told by the
    spread of the samples' own means, and not by the number of values.

    Attributes:
        units: samples, or rows of the layer's input where these are no whole number a sample.
        values: per channel.
        mean, var: of all values, float64, shape (C,).
        mean_spread: variance between the units' means, shape (C,); NaN for one unit.
        var_spread: variance between the units' mean squared deviations from ``mean``, shape (C,); NaN for one unit.
    """

    units: int
    values: int
    mean: Tensor
    var: Tensor
    mean_spread: Tensor
    var_spread: Tensor

    @property
    def moments(self) -> Moments:
        """As Moments."""
        return Moments(torch.tensor(self.values), self.mean, self.var)

    def noise(self, samples: float, eps: float) -> float:
        """How much the mean of so many samples scatters, in standard deviations, rms over the channels; may be NaN."""
        return float((self.mean_spread / samples / (self.var + eps)).mean().sqrt())


@dataclass(eq=False)
class SampleRun:
    """What was seen while a batch went through the model.

    Attributes:
        samples: in the batch.
        calls: layer name -> its calls in the pass as in training, in order; without layers that were not reached.
        dropouts_before: layer name -> names of the active dropouts that ran before its first call.
        reached: layers that any pass reached.
        single_value: the layer that the batch leaves one value a channel, which training refuses; else None. Nothing
            is then known of the layers after it.
        gap: see [`bnkit.probes.train_eval_gap`][]; None where ``single_value`` is not.
    """

    samples: int
    calls: dict[str, list[Call]] = field(default_factory=dict)
    dropouts_before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    single_value: str | None = None
    gap: GapReport | None = None

    def values_per_sample(self, name: str) -> float | None:
        """How many values a channel of the layer gets from one sample in a call; None where nothing is known."""
        if name not in self.calls:
            return 1.0 if name == self.single_value else None
        return self.calls[name][0].values / self.samples

    def noise(self, name: str, samples: float, eps: float) -> float | None:
        """See ``Call.noise``: of the layer's first call; None where it is not known."""
        noise = self.calls[name][0].noise(samples, eps) if name in self.calls else math.nan
        return noise if math.isfinite(noise) else None


def run_sample(
    model: nn.Module, layers: Mapping[str, _BatchNorm], batch: Any, forward: Forward | None, *, small: bool
) -> SampleRun:
    """Run the model on a batch, three times and without gradient, and leave everything as it was.

    Args:
        model: the unwrapped model.
        layers: its BatchNorm layers by name.
        batch: as the loader gives it.
        forward: how to run the model on it; None: the default.
        small: whether a batch that leaves a layer a single value is what training has, and is to be told; else it
            cannot be used, and that is an error.

    Raises:
        TypeError: for a batch that the default forward cannot feed.
        ValueError: for a batch of unknown size, and unless ``small`` for one that leaves a layer a single value.
    """
    samples = known_samples_in(batch)
    if not samples:
        raise ValueError("The sample holds no tensor with samples in it: pass a batch as your loader gives it.")
    run = SampleRun(samples)
    with stand_ins(layers), _left_alone(model):
        if not model.training:  # nobody knows what training will freeze
            for module in model.modules():
                module.training = True
        last: list[str] = []
        with _watching(model, layers, run, last):
            try:
                feed(model, batch, 0, forward)
            except ValueError as error:
                if not small or "single value per channel" not in str(error) or not last:
                    raise
                run.single_value = last[-1]
                return run
    with _parameters_preserved(model), _reaching(model, layers, run):
        run.gap = train_eval_gap(model, batch, forward=forward, loss=lambda *_: None)  # type: ignore[arg-type]
    return run


def try_sample(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the model on a batch in evaluation mode, in which no layer waits for other ranks; leave all as it was.

    Raises:
        Exception: of any kind, where that fails.
    """
    with _left_alone(model):
        for module in model.modules():
            module.training = False
        feed(model, batch, 0, forward)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Run the model without gradient, and give everything back as it was."""
    with (
        torch.inference_mode(any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))),
        torch.no_grad(),
        _parameters_preserved(model),
        random_states_preserved(model),
        preserved(model),
        eager(),
    ):
        yield


@contextmanager
def _watching(model: nn.Module, layers: Mapping[str, _BatchNorm], run: SampleRun, last: list[str]) -> Iterator[None]:
    """Note each call of a layer, and the dropouts before it."""
    dropouts: list[str] = []

    def before_layer(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            last.append(name)
            run.reached.add(name)
            x = args[0] if args else kwargs.get("input")
            channels = layer.num_features
            if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == channels and x.numel() > 0:
                run.dropouts_before.setdefault(name, tuple(dropouts))
                if x.numel() > channels:
                    run.calls.setdefault(name, []).append(_call(x, run.samples))

        return hook

    def before_dropout(name: str) -> Callable[..., None]:
        return lambda module, *_: dropouts.append(name) if module.training else None

    with _pre_hooks_restored(model):
        for name, layer in layers.items():
            layer.register_forward_pre_hook(before_layer(name), with_kwargs=True)
        for name, module in model.named_modules():
            if active_dropout(module):
                module.register_forward_pre_hook(before_dropout(name))
        yield


@contextmanager
def _reaching(model: nn.Module, layers: Mapping[str, _BatchNorm], run: SampleRun) -> Iterator[None]:
    """Note which layers are reached in evaluation mode too."""

    def reached(name: str) -> Callable[..., None]:
        return lambda *_: run.reached.add(name)

    with _pre_hooks_restored(model):
        for name, layer in layers.items():
            layer.register_forward_pre_hook(reached(name))
        yield


@contextmanager
def _pre_hooks_restored(model: nn.Module) -> Iterator[None]:
    """Take the forward pre-hooks away that were added meanwhile."""
    kept = [(module, set(module._forward_pre_hooks)) for module in model.modules()]

    def undo() -> None:
        for module, keys in kept:
            for key in [key for key in module._forward_pre_hooks if key not in keys]:
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks.pop(key)

    with undoing(undo):
        yield


@contextmanager
def _parameters_preserved(model: nn.Module) -> Iterator[None]:
    """Give back the values of parameters that a forward writes to, as that of a momentum encoder does."""
    kept = [(parameter, parameter.data, parameter.detach().clone()) for parameter in model.parameters()]

    def undo() -> None:
        with torch.no_grad():
            for parameter, storage, content in kept:
                if parameter.data_ptr() != storage.data_ptr():
                    parameter.data = storage
                if not storage.is_meta and not torch.equal(storage, content):
                    storage.copy_(content)

    with undoing(undo):
        yield


def _call(x: Tensor, samples: int) -> Call:
    """Reduce a layer's input, in slices that bound the copies in float64."""
    units = samples if x.shape[0] % samples == 0 else x.shape[0]
    # The rows of one sample lie together, as a reshape from (samples, rows, …) has them.
    rows = x.reshape(units, -1, *x.shape[1:])
    slices = torch.split(rows, max(1, _SLICE_ELEMENTS // rows[0].numel()))
    dims = [1, *range(3, rows.ndim)]
    means = torch.cat([to_float64(part).mean(dims) for part in slices])  # (units, C)
    mean = means.mean(0)
    centre = mean.view(-1, *[1] * (rows.ndim - 3))
    squares = torch.cat([(to_float64(part) - centre).square().mean(dims) for part in slices])
    values = x.numel() // x.shape[1]
    spreads = (means.var(0), squares.var(0)) if units > 1 else (torch.full_like(mean, math.nan),) * 2
    return Call(units, values, mean.cpu(), squares.mean(0).cpu(), spreads[0].cpu(), spreads[1].cpu())
