"""Ghost batches out of torch's own batch norm: ghosts laid side by side as channels, or one call a ghost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bnkit.norms.base import accumulation_dtype

__all__ = ["GhostCalls", "Grouping", "is_channels_last", "sizes"]

Grouping = Literal["strided", "contiguous"]

_Statistics = tuple[int, Tensor, Tensor]
"""Values a channel of one ghost; means and unbiased variances of ghosts of that size, each of shape (ghosts, C)."""


@dataclass
class GhostCalls:
    """Training batch norm over ``count`` ghosts, for any device, layout and dtype, compiled or not.

    Args:
        count: into how many ghosts to cut the batch.
        grouping: which samples share a ghost, as in [`bnkit.norms.Ghost`][].
        weight: of shape (C,), or None.
        bias: of shape (C,), or None.
        eps: what is added to a ghost's variance.
        running: a running buffer, which gives the statistics' dtype; None: none are wanted.
    """

    count: int
    grouping: Grouping
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    running: Tensor | None = None
    statistics: list[_Statistics] = field(default_factory=list, init=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, and mean and unbiased variance of all values, each of shape (C,), where they are wanted."""
        if self.grouping == "contiguous" and _one_by_one(x, self.count):
            ghosts = torch.split(x, sizes(x.shape[0], self.count))
            output = torch.cat([self._batch_norm(ghost, 1) for ghost in ghosts])
        else:
            last = is_channels_last(x)
            blocks = _split(x.movedim(1, -1) if last else x, self.count, self.grouping)
            output = _join([self._side_by_side(block, last) for block in blocks], self.grouping)
            output = output.movedim(-1, 1) if last else output
        return (output, *_pool(self.statistics)) if self.statistics else (output, None, None)

    def _side_by_side(self, block: Tensor, last: bool) -> Tensor:
        """Normalise (samples, ghosts, C, …), or (samples, ghosts, …, C), in one call: to it, ghosts are channels."""
        if last:
            shape = (block.shape[1], block.shape[-1])
            folded = block.movedim(1, -2).flatten(-2).movedim(-1, 1)
            return torch.unflatten(self._batch_norm(folded, shape[0]).movedim(1, -1), -1, shape).movedim(-2, 1)
        shape = (block.shape[1], block.shape[2])
        return torch.unflatten(self._batch_norm(block.flatten(1, 2), shape[0]), 1, shape)

    def _batch_norm(self, x: Tensor, ghosts: int) -> Tensor:
        """Torch's kernel over (samples, ghosts * C, …); notes the ghosts' statistics where they are wanted."""
        weight, bias = self.weight, self.bias
        if ghosts > 1:
            weight = None if weight is None else weight.repeat(ghosts)
            bias = None if bias is None else bias.repeat(ghosts)
        mean = var = None
        if self.running is not None:
            # From the running buffer: statistics allocated from a bfloat16 input would be bfloat16.
            mean, var = self.running.new_zeros(2, ghosts * self.running.shape[0]).unbind()
            self.statistics.append((x.numel() // x.shape[1], mean.view(ghosts, -1), var.view(ghosts, -1)))
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)


def sizes(samples: int, count: int) -> list[int]:
    """Samples of each of ``count`` ghosts, the larger ones first."""
    return [samples // count + (ghost < samples % count) for ghost in range(count)]


def is_channels_last(x: Tensor) -> bool:
    """Whether the channel is the last dimension in memory, and not the second."""
    if x.is_contiguous():
        return False
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _split(x: Tensor, count: int, grouping: Grouping) -> list[Tensor]:
    """The batch as at most two blocks (samples, ghosts, C, …) of ghosts of one size; views where that can be."""
    # Not divmod, which torch.compile does not know for symbolic sizes.
    size, larger = x.shape[0] // count, x.shape[0] % count
    if larger == 0:
        shape = (size, count) if grouping == "strided" else (count, size)
        block = torch.unflatten(x, 0, shape)
        return [block if grouping == "strided" else block.transpose(0, 1)]
    # split, not slices: a slice's backward fills a tensor of the whole batch with zeros, for each slice.
    if grouping == "strided":
        rows, last = torch.split(x, [size * count, larger])
        left, right = torch.split(torch.unflatten(rows, 0, (size, count)), [larger, count - larger], dim=1)
        return [torch.cat((left, last.unsqueeze(0))), right]
    head, tail = torch.split(x, [larger * (size + 1), (count - larger) * size])
    return [
        torch.unflatten(head, 0, (larger, size + 1)).transpose(0, 1),
        torch.unflatten(tail, 0, (count - larger, size)).transpose(0, 1),
    ]


def _one_by_one(x: Tensor, count: int) -> bool:
    """Whether consecutive ghosts are so large that a kernel call for each costs less than a copy of all."""
    return x.device.type == "cpu" and x.numel() >= count * 2**15 and not torch.compiler.is_compiling()


def _join(blocks: list[Tensor], grouping: Grouping) -> Tensor:
    """The inverse of ``_split``."""
    if grouping == "contiguous":
        parts = [block.transpose(0, 1).flatten(0, 1) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if len(blocks) == 1:
        return blocks[0].flatten(0, 1)
    longer, right = blocks
    left, last = torch.split(longer, [len(longer) - 1, 1])
    return torch.cat((torch.cat((left, right), dim=1).flatten(0, 1), last.squeeze(0)))


def _pool(statistics: list[_Statistics]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all values, by the law of total variance."""
    by_size: dict[int, list[_Statistics]] = {}
    for entry in statistics:
        by_size.setdefault(entry[0], []).append(entry)
    dtype = accumulation_dtype(statistics[0][1])
    merged = [(size, _stack(entries, 1).to(dtype), _stack(entries, 2).to(dtype)) for size, entries in by_size.items()]
    total = sum(size * len(means) for size, means, _ in merged)
    zero = merged[0][1].new_zeros(())
    mean = sum((means.sum(0) * (size / total) for size, means, _ in merged), start=zero)
    squares = sum(
        (variances.sum(0) * (size - 1) + (means - mean).square().sum(0) * size for size, means, variances in merged),
        start=zero,
    )
    return mean, squares / (total - 1)


def _stack(entries: list[_Statistics], part: Literal[1, 2]) -> Tensor:
    return entries[0][part] if len(entries) == 1 else torch.cat([entry[part] for entry in entries])
