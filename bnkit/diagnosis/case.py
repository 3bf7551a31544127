"""What the rules look at: a model, what is known of how it is trained, and what a sample told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bnkit.diagnosis.flow import Before, what_comes_before
from bnkit.diagnosis.sample import SampleRun
from bnkit.layers import tracks_statistics
from bnkit.moments import to_float64
from bnkit.norms import MovingAverage, Sync, Variant, spec_of

__all__ = ["Case", "rms"]


@dataclass(eq=False)
class Case:
    """One diagnosis.

    Attributes:
        model: unwrapped.
        layers: its BatchNorm layers by name, in the model's order.
        optimizers: those that train it; none where they are not known.
        batch_size: samples in one device's training batch; None: not known.
        smallest_batch: samples in the smallest one; None: not known.
        world_size: ranks that train together.
        accumulate: batches from one optimizer step to the next.
        recalibrates: whether the statistics are measured before the model is used.
        averages: averages of the model's weights that are to be used in its place.
        run: what a sample told; None without one.
    """

    model: nn.Module
    layers: dict[str, _BatchNorm]
    optimizers: Sequence[torch.optim.Optimizer] = ()
    batch_size: int | None = None
    smallest_batch: int | None = None
    world_size: int = 1
    accumulate: int = 1
    recalibrates: bool = False
    averages: Sequence[AveragedModel] = ()
    run: SampleRun | None = None

    # ------------------------------------------------------------------ how a layer normalises

    def is_frozen(self, name: str) -> bool:
        """Whether training normalises by the layer's running statistics, and leaves them."""
        layer = self.layers[name]
        held = isinstance(layer, Variant) and layer.holds_statistics
        return held or (self.model.training and not layer.training)

    def by_sample(self, name: str) -> bool:
        """Whether neither mode normalises by statistics of a batch."""
        layer = self.layers[name]
        return isinstance(layer, Variant) and layer.by_sample

    def by_batch(self) -> Iterator[str]:
        """The layers that training normalises by the batch's own statistics."""
        return (name for name in self.layers if not (self.is_frozen(name) or self.by_sample(name)))

    def by_batch_alone(self) -> Iterator[str]:
        """Those of them with no remedy against a small batch: Renorm and MovingAverage look beyond it."""
        layers = self.layers
        return (n for n in self.by_batch() if not getattr(layers[n], "trains_by_statistics", False))

    def remembering(self) -> Iterator[str]:
        """The layers whose running statistics are used, at inference or in training."""
        return (name for name in self.layers if self.statistics.get(name) is not None and not self.by_sample(name))

    def learning(self) -> Iterator[str]:
        """Those of them whose running statistics follow training."""
        return (n for n in self.remembering() if tracks_statistics(self.layers[n]) and not self.is_frozen(n))

    def keeps_mean(self, name: str) -> bool:
        """Whether the layer subtracts a mean and remembers it."""
        return not isinstance(spec_of(self.layers[name]), MovingAverage)

    # ------------------------------------------------------------------ how many samples

    def is_synchronized(self, name: str) -> bool:
        """Whether the layer is made to normalise by the batches of several ranks."""
        return self.ranks_together(name, 2**30) > 1

    def ranks_together(self, name: str, world_size: int | None = None) -> int:
        """How many ranks' batches the layer normalises together."""
        layer, world = self.layers[name], self.world_size if world_size is None else world_size
        if isinstance(layer, nn.SyncBatchNorm):
            return world
        spec = spec_of(layer)
        return min(spec.group_size or world, world) if isinstance(spec, Sync) else 1

    def parts(self, name: str, batch: int) -> int:
        """Into how many ghosts the layer cuts a batch."""
        layer = self.layers[name]
        return layer.parts_of(batch) if isinstance(layer, Variant) else 1

    def samples_together(self, name: str) -> int | None:
        """How many samples the layer normalises together in training; None where that is not known."""
        if self.batch_size is None:
            return None
        return self.batch_size * self.ranks_together(name) // self.parts(name, self.batch_size)

    # ------------------------------------------------------------------ what it remembers

    @cached_property
    def statistics(self) -> dict[str, tuple[Tensor, Tensor] | None]:
        """Running mean and variance on the CPU in float64; None where there are none, or they hold no values."""
        found: dict[str, tuple[Tensor, Tensor] | None] = {}
        for name, layer in self.layers.items():
            mean, var = layer.running_mean, layer.running_var
            known = mean is not None and var is not None and not mean.is_meta and not var.is_meta
            found[name] = (to_float64(mean).cpu(), to_float64(var).cpu()) if known else None  # type: ignore[arg-type]
        return found

    def is_untouched(self, name: str) -> bool:
        """Whether the running statistics are still the 0 and 1 that they began with."""
        pair, counter = self.statistics[name], self.layers[name].num_batches_tracked
        if pair is None or (counter is not None and bool(counter)):
            return False
        return not bool(pair[0].any()) and bool((pair[1] == 1).all())

    # ------------------------------------------------------------------ what comes before it

    @cached_property
    def before(self) -> dict[str, Before]:
        """What comes before each layer, for those where it could be traced."""
        found = what_comes_before(self.model)
        return {name: found[layer] for name, layer in self.layers.items() if layer in found}


def rms(values: Tensor) -> float:
    """Root mean square of the finite values; NaN where there are none."""
    known = values[values.isfinite()]
    return float(known.square().mean().sqrt()) if len(known) else math.nan
