"""What each training step normalised, recovered from the step that the running statistics took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.layers import keeps_forward, tracks_statistics
from bnkit.norms import Variant

__all__ = ["StepRecorder", "Steps", "why_not_recorded"]

_VALUES = 2**20
"""At most so many numbers are kept of each kind: 4 MiB in float32."""


class Steps(NamedTuple):
    """K steps of L layers with C channels in all, on the layers' device, until the next is recorded. NaN: not known.

    Attributes:
        running_mean, running_var: as they were before each step, (K, C).
        mean, var: of what the step normalised, (K, C); the variance is unbiased, as the running one is. Several calls
            of a layer in one step (shared layers, activation checkpointing) are averaged.
        calls: of each layer in each step, (K, L).
        known: whether the layer took part and what it normalised could be recovered, (K, L), bool. Where it is, a NaN
            is a NaN that the layer met.
    """

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor
    var: Tensor
    calls: Tensor
    known: Tensor


class StepRecorder:
    r"""Keeps the running statistics of layers before and after each step, and says later what the steps normalised.

    BatchNorm's update is $R' = (1 - m) R + m B$, so that the batch's statistics B are
    $(R' - (1 - m) R) / m$; after k calls $(1 - m)^k$ stands for $1 - m$, and with ``momentum=None``
    m is one over the number of calls so far. A step costs a few copies of all buffers at once, whatever the number of
    layers; nothing is hooked, so compiled layers are seen too, and nothing waits for a device.

    In float32 the mean comes out to about 1e-6 of ``|mean| / std`` over the momentum; a batch variance below about 1e-6
    of the running one is lost in its rounding. A layer whose buffers are replaced by others is unknown from then on;
    one whose momentum changes from step to step is followed.

    Args:
        layers: of one device and one dtype of buffers, for which ``why_not_recorded`` has no reason.
        capacity: steps to keep at most; fewer where the layers are large.
    """

    def __init__(self, layers: Sequence[_BatchNorm], capacity: int) -> None:
        self.layers = tuple(layers)
        self._buffers = self._find_buffers()
        means, _, calls = self._buffers
        self.channels = [len(mean) for mean in means]
        self.layer_of_channel = torch.repeat_interleave(torch.tensor(self.channels)).to(means[0].device)
        total = sum(self.channels)
        self.capacity = max(1, min(capacity, _VALUES // (2 * total)))
        self._tensors = [*means, *self._buffers[1]]
        self._calls = [count.view(1) for count in calls]
        rows = means[0].new_empty(2, self.capacity, 2 * total)
        counts = calls[0].new_empty(2, self.capacity, len(calls))
        # Views of the rows once and for all: making them is half of what a step costs.
        self._rows, self._row_views = rows, [list(half.unbind()) for half in rows.unbind()]
        self._counts, self._count_views = counts, [list(half.unbind()) for half in counts.unbind()]
        self._momenta: list[list[float | None]] = [[]] * self.capacity
        self._begun = False
        self.recorded = 0

    @property
    def is_current(self) -> bool:
        """Whether all layers still have the buffers that they had when the record began."""
        return not any(self._replaced())

    @torch.no_grad()
    def before(self) -> None:
        """Keep the running statistics as a step begins; a second call for the same step replaces the first."""
        self._keep(0)
        self._momenta[self.recorded] = [layer.momentum for layer in self.layers]
        self._begun = True

    @torch.no_grad()
    def after(self) -> bool:
        """Keep them as the step ends. Returns whether ``take`` is due: there is no room for another step."""
        if not self._begun:  # nobody knows what was before: a step without calls, of which nothing is known
            self.before()
        self._begun = False
        self._keep(1)
        self.recorded += 1
        return self.recorded == self.capacity

    @torch.no_grad()
    def take(self) -> Steps:
        """What the steps recorded since the last take normalised; they are forgotten."""
        steps = self.recorded
        self.recorded = 0
        momenta = self._momenta[:steps]
        if all(row == momenta[0] for row in momenta):
            momenta = momenta[:1]
        old, new = (half[:steps] for half in self._rows)
        calls_before, calls_after = (half[:steps] for half in self._counts)
        calls = calls_after - calls_before
        if self._begun:  # in the middle of a step, whose beginning is now the first of the next record
            old = old.clone()
            for half in (self._row_views[0], self._count_views[0]):
                half[0].copy_(half[steps])
            self._momenta = [self._momenta[steps], *self._momenta[1:]]
        # Mostly each step is one call of each layer, and one row of factors serves all; looking is free on the CPU.
        alike = len(momenta) == 1 and None not in momenta[0]
        alike = alike and calls.device.type == "cpu" and bool((calls == 1).all())
        rows = slice(1) if alike else slice(None)
        factor = self._factor(momenta, calls[rows], calls_after[rows], old.dtype)
        replaced = self._replaced()
        if any(replaced):  # from some step on, the layer used others: nobody knows from which
            factor.masked_fill_(torch.tensor(replaced, device=factor.device), torch.nan)
        known = factor.isfinite().expand_as(calls)
        factor = factor[:, self.layer_of_channel].repeat(1, 2)
        # In this form, without factoring out the difference: it mirrors the rounding of the kernel's own update.
        batch = ((1 - factor) * old).sub_(new).div_(-factor)
        mean, var = batch.chunk(2, dim=1)
        running_mean, running_var = old.chunk(2, dim=1)
        return Steps(running_mean, running_var, mean, var.clamp_(min=0), calls, known)

    @staticmethod
    def _factor(
        momenta: Sequence[Sequence[float | None]], calls: Tensor, calls_after: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The weight of the step's batches in the running statistics after it, (K, L); NaN where it is (next to) 0."""
        wide = torch.float32 if calls.device.type == "mps" else torch.float64
        kept = torch.tensor([[1 - (m or 0.0) for m in row] for row in momenta], dtype=wide, device=calls.device)
        cumulative = torch.tensor([[m is None for m in row] for row in momenta], device=calls.device)
        weight = torch.where(cumulative, calls / calls_after.clamp_min(1).to(wide), 1 - kept**calls)
        return weight.masked_fill((calls <= 0) | (weight < _least_weight(dtype)), torch.nan).to(dtype)

    def _keep(self, half: int) -> None:
        torch.cat(self._tensors, out=self._row_views[half][self.recorded])
        torch.cat(self._calls, out=self._count_views[half][self.recorded])

    def _find_buffers(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for layer in self.layers:
            for kind, name in zip(found, ("running_mean", "running_var", "num_batches_tracked"), strict=True):
                kind.append(layer._buffers[name])  # type: ignore[arg-type]
        return found

    def _replaced(self) -> list[bool]:
        """Of each layer, whether one of its buffers is another than when the record began."""
        kinds = zip(self._buffers, self._find_buffers(), strict=True)
        same = [[kept is now for kept, now in zip(kind, found, strict=True)] for kind, found in kinds]
        return [not all(layer) for layer in zip(*same, strict=True)]


def _least_weight(dtype: torch.dtype) -> float:
    """A batch with less weight in the running statistics drowns, to more than about a per cent, in their rounding."""
    return 100 * torch.finfo(dtype).eps


def why_not_recorded(layer: _BatchNorm) -> str | None:
    """Why the running statistics of a layer do not tell what it normalises; None where they do."""
    if isinstance(layer, Variant):
        if layer.holds_statistics or layer.by_sample:
            return f"{layer.spec} takes no batch statistics"
    elif not keeps_forward(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if layer.running_mean is None or layer.running_var is None:
        return "it keeps no running statistics"
    if not tracks_statistics(layer):
        return "its running statistics are not updated (track_running_stats=False)"
    if layer.num_batches_tracked is None:
        return "it does not count its batches"
    if layer.running_mean.dtype not in (torch.float32, torch.float64):
        return f"its running statistics are {layer.running_mean.dtype}, which is too coarse"
    if layer.momentum is not None and layer.momentum < _least_weight(layer.running_mean.dtype):
        return f"its momentum is {layer.momentum:g}"
    return "it is in evaluation mode (frozen)" if not layer.training else None
