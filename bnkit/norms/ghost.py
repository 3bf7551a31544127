"""Ghost batches: the exact estimator over a scope narrower than the device's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnkit.norms.base import Scoped, accumulation_dtype
from bnkit.norms.spec import Spec

__all__ = ["Ghost", "GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "ghost_count", "ghost_sizes"]

Grouping = Literal["strided", "contiguous"]

_Statistics = tuple[int, Tensor, Tensor]
"""Values a channel of one ghost; means and unbiased variances of ghosts of that size, each of shape (ghosts, C)."""


class _Ghost(Scoped):
    """Normalises each ghost batch by its own statistics; see :class:`Ghost`."""

    def _is_device_batch(self, input: Tensor) -> bool:  # noqa: A002
        return self._count(input) == 1

    def parts_of(self, samples: int) -> int:
        """The number of ghosts."""
        return ghost_count(samples, self.spec.size)

    def _count(self, x: Tensor) -> int:
        return ghost_count(x.shape[0], self.spec.size, one_value_each=x.shape[2:].numel() == 1)

    def _normalize(self, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # noqa: A002
        count, grouping = self._count(input), self.spec.grouping
        statistics: list[_Statistics] = []
        if grouping == "contiguous" and _one_by_one(input, count):
            ghosts = torch.split(input, _sizes(input.shape[0], count))
            output = torch.cat([self._batch_norm(ghost, 1, statistics) for ghost in ghosts])
        else:
            last = _is_channels_last(input)
            blocks = _split(input.movedim(1, -1) if last else input, count, grouping)
            output = _join([self._side_by_side(block, last, statistics) for block in blocks], grouping)
            output = output.movedim(-1, 1) if last else output
        return (output, *_pool(statistics)) if statistics else (output, None, None)

    def _side_by_side(self, block: Tensor, last: bool, statistics: list[_Statistics]) -> Tensor:
        """Normalise (samples, ghosts, C, …), or (samples, ghosts, …, C), in one call: to it, ghosts are channels."""
        shape = (block.shape[1], self.num_features)
        if last:
            folded = block.movedim(1, -2).flatten(-2).movedim(-1, 1)
            output = self._batch_norm(folded, shape[0], statistics)
            return torch.unflatten(output.movedim(1, -1), -1, shape).movedim(-2, 1)
        return torch.unflatten(self._batch_norm(block.flatten(1, 2), shape[0], statistics), 1, shape)

    def _batch_norm(self, x: Tensor, ghosts: int, statistics: list[_Statistics]) -> Tensor:
        """Torch's kernel over (samples, ghosts * C, …); notes the ghosts' statistics where the layer tracks them."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if ghosts > 1:
            weight = None if weight is None else weight.repeat(ghosts)
            bias = None if bias is None else bias.repeat(ghosts)
        mean = var = None
        if self.track_running_stats and self.running_mean is not None:
            # From the running buffer: statistics allocated from a bfloat16 input would be bfloat16.
            mean, var = self.running_mean.new_zeros(2, ghosts * self.num_features).unbind()
            statistics.append((x.numel() // x.shape[1], mean.view(ghosts, -1), var.view(ghosts, -1)))
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """Ghost batch normalization over (N, C) or (N, C, L); see :class:`Ghost`."""


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """Ghost batch normalization over (N, C, H, W); see :class:`Ghost`."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """Ghost batch normalization over (N, C, D, H, W); see :class:`Ghost`."""


@dataclass(frozen=True)
class Ghost(Spec):
    r"""Batch normalization over ghost batches of about ``size`` samples of the device's batch.

    .. math:: y_i = \gamma \frac{x_i - \mu_{g(i)}}{\sqrt{\sigma_{g(i)}^2 + \epsilon}} + \beta

    The batch of N samples is cut into ``k = max(1, N // size)`` ghosts whose sizes differ by at most one, so a ghost
    has at least ``size`` samples where N has. With one ghost the layer is plain BatchNorm, bit for bit.

    Warning:
        Where a layer has one value a channel and sample, such as on (N, C), a ghost of one sample has no variance:
        ``size=1`` is then taken as 2. Under "contiguous" a loader that sorts by class puts few classes into a ghost.

    Training: one step of the running statistics a forward, whatever the number of ghosts, with mean and unbiased
    variance of the whole batch, pooled from the ghosts by the law of total variance and weighted by count. (The mean
    of the ghost variances would be too small where the values of one sample correlate.)

    Inference: BatchNorm's own; ``size`` plays no part.

    Source: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch
    training of neural networks", NeurIPS 2017, algorithm 1 (whose running statistics take a step for each ghost; here
    one).

    Args:
        size: samples a ghost, at least 1.
        grouping: which samples share a ghost. "strided": sample i is in ghost ``i mod k``, which costs what plain
            BatchNorm costs on contiguous tensors; "contiguous": consecutive samples, the faster of the two on
            channels_last tensors.
    """

    size: int
    grouping: Grouping = "strided"

    layers = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Ghost's size is a number of samples, an int of at least 1, not {self.size!r}.")
        if self.grouping not in ("strided", "contiguous"):
            raise ValueError(f"Ghost's grouping is 'strided' or 'contiguous', not {self.grouping!r}.")


def ghost_count(samples: int, size: int, *, one_value_each: bool = False) -> int:
    """Into how many ghosts a batch is cut: ``max(1, samples // size)``, and none of them has one value only."""
    return max(1, min(samples // size, samples // 2) if one_value_each else samples // size)


def ghost_sizes(samples: int, size: int) -> list[int]:
    """Sizes of the ghosts of a batch, the larger ones first."""
    return _sizes(samples, ghost_count(samples, size))


def _sizes(samples: int, count: int) -> list[int]:
    return [samples // count + (ghost < samples % count) for ghost in range(count)]


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
    """The inverse of :func:`_split`."""
    if grouping == "contiguous":
        parts = [block.transpose(0, 1).flatten(0, 1) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if len(blocks) == 1:
        return blocks[0].flatten(0, 1)
    longer, right = blocks
    left, last = torch.split(longer, [len(longer) - 1, 1])
    return torch.cat((torch.cat((left, right), dim=1).flatten(0, 1), last.squeeze(0)))


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channel is the last dimension in memory, and not the second."""
    if x.is_contiguous():
        return False
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


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
