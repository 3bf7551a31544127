"""A dense tensor as blocks of ghosts, and what is summed over them and broadcast back, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnkit.norms.ghost_calls import Grouping, is_channels_last, sizes

__all__ = ["GhostBlocks"]

aten = torch.ops.aten

LONG = 2**15
"""Numbers in a stretch of one ghost's rows from which on torch's sums, a call each, cost less than passes."""


class GhostBlocks:
    """Sums over the ghosts of a dense tensor, and passes with one number a ghost and channel, of shape (ghosts, C).

    The tensor is seen as it lies, as blocks that these numbers broadcast over. Where the channel is last in memory, or
    has one value a sample, the blocks are rows (a, ghosts, b, C), one block for each size of ghosts; else there is one
    block of planes (N, C, P).
    """

    def __init__(self, x: Tensor, count: int, grouping: Grouping) -> None:
        self.count, self.grouping = count, grouping
        self.samples, self.channels, self.points = x.shape[0], x.shape[1], x.shape[2:].numel()
        self.last = is_channels_last(x)
        self.in_planes = not self.last and self.points > 1
        size, larger = divmod(self.samples, count)
        if grouping == "strided":  # each of the larger ghosts has one of the samples that are left over
            cuts = [(size, count, 1, slice(count)), (1, larger, 1, slice(larger))]
        else:
            cuts = [(1, larger, size + 1, slice(larger)), (1, count - larger, size, slice(larger, count))]
        self.cuts = [cut for cut in cuts if cut[1]]
        self.values: float | Tensor = float(size * self.points)
        """Values a ghost and channel: one number, or of shape (ghosts, 1) where ghosts differ."""
        if larger:
            self.values = x.new_tensor(sizes(self.samples, count)).mul_(self.points).unsqueeze_(1)
        # One ghost's rows that follow each other: a sample or, where samples are neighbours, the whole ghost.
        self.stretches = self.samples if grouping == "strided" else count
        self.by_stretch = not self.in_planes and x.numel() >= self.stretches * LONG

    def laid_out(self, grad: Tensor) -> Tensor:
        """The gradient in the layout of x."""
        if not self.last:
            return grad.contiguous()
        return grad.contiguous(memory_format=torch.channels_last if grad.dim() == 4 else torch.channels_last_3d)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """Views of x as it lies."""
        if self.in_planes:
            return [x.view(self.samples, self.channels, self.points)]
        return self._cut(x.movedim(1, -1) if self.last else x, self.points)

    def spread(self, numbers: Tensor) -> list[Tensor]:
        """One number a ghost and channel, as it broadcasts over each block."""
        return [self._of_samples(numbers).unsqueeze(2)] if self.in_planes else self._by_cut(numbers)

    def moments(self, x: list[Tensor], scratch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance."""
        if self.by_stretch:
            return self._moments_by_stretch(x)
        mean = self._means(x)
        for block, out, middle in zip(x, scratch, self.spread(mean), strict=True):
            # (block - middle)², in one pass
            torch._C._nn.mse_loss(block, middle, 0, out=out)  # type: ignore[call-arg, arg-type]
        return mean, self._means(scratch)

    def gradient_means(
        self, grad: list[Tensor], x: list[Tensor], mean: Tensor, scratch: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The means of ``grad`` and of ``grad * (x - mean)``."""
        if self.in_planes:
            middle = self._of_samples(mean).view(-1)
            product, plain = _gradient_sums(self._as_channels(grad), self._as_channels(x), middle)
        elif self.by_stretch:
            middles = self._of_samples(mean) if self.grouping == "strided" else mean
            parts = zip(self._parts(grad), self._parts(x), middles, strict=True)
            product, plain = map(torch.stack, zip(*(_gradient_sums(*part) for part in parts), strict=True))
            if self.grouping == "contiguous":
                return plain.div_(self.values), product.div_(self.values)
        else:
            for block, given, out, middle in zip(x, grad, scratch, self.spread(mean), strict=True):
                torch.sub(block, middle, out=out).mul_(given)
            return self._means(grad), self._means(scratch)
        plain, product = (self._ghost_means(self._cut(sums, 1)) for sums in (plain, product))
        return plain.div_(self.points), product.div_(self.points)

    def scale_and_shift(self, x: list[Tensor], scale: Tensor, shift: Tensor, out: list[Tensor]) -> None:
        """``out = x * scale + shift``."""
        if not self.in_planes:
            for block, into, factor, constant in zip(x, out, self.spread(scale), self.spread(shift), strict=True):
                torch.addcmul(constant, block, factor, out=into)
            return
        # Batch norm at inference is the one pass of torch's that is fast with two numbers a plane.
        scale, shift = self._of_samples(scale).view(-1), self._of_samples(shift).view(-1)
        zero, one, none = torch.zeros_like(scale), torch.ones_like(scale), scale.new_empty(0)
        aten.native_batch_norm.out(
            self._as_channels(x), scale, shift, zero, one, False, 0.0, 0.0,
            out=self._as_channels(out), save_mean=none, save_invstd=none,
        )  # fmt: skip

    def add_scaled(self, x: list[Tensor], scale: Tensor, out: list[Tensor]) -> None:
        """``out += x * scale``."""
        for block, into, factor in zip(x, out, self.spread(scale), strict=True):
            into.addcmul_(block, factor)

    def pool(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of all values, by the law of total variance."""
        total = self.samples * self.points
        middle = self.whole(mean).div_(total)
        deviation = mean - middle
        return middle, self.whole(torch.addcmul(var, deviation, deviation)).div_(total - 1)

    def whole(self, means: Tensor) -> Tensor:
        """The sum over all values, from their mean in each ghost."""
        return means.sum(0).mul_(self.values) if isinstance(self.values, float) else (means * self.values).sum(0)

    def _means(self, blocks: list[Tensor]) -> Tensor:
        return self._ghost_means(self._cut(blocks[0].mean(2), 1) if self.in_planes else blocks)

    def _ghost_means(self, blocks: list[Tensor]) -> Tensor:
        """Each ghost's mean over its rows."""
        if len(blocks) == 1:
            block = blocks[0]
            # Torch is slow where it sums over both at once.
            both = block.shape[0] > 1 and block.shape[2] > 1
            return block.mean(0).mean(1) if both else block.mean((0, 2))
        total = blocks[0].new_zeros(self.count, self.channels)
        for block, (_, _, _, ghosts) in zip(blocks, self.cuts, strict=True):
            total[ghosts] += block.sum(0).sum(1)
        rows = sum(block.numel() for block in blocks) // self.channels
        return total.div_(self.values * (rows / (self.samples * self.points)))

    def _cut(self, rows: Tensor, points: int) -> list[Tensor]:
        """Blocks of rows, of ``points`` rows a sample."""
        shapes = [(outer, ghosts, inner * points, self.channels) for outer, ghosts, inner, _ in self.cuts]
        if len(shapes) == 1:
            return [rows.view(shapes[0])]
        lengths = [outer * ghosts * inner for outer, ghosts, inner, _ in self.cuts]
        parts = torch.split(rows.view(self.samples, -1), lengths)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _by_cut(self, numbers: Tensor) -> list[Tensor]:
        if len(self.cuts) == 1:
            return [numbers.unsqueeze(1)]
        return [numbers[ghosts].unsqueeze(1) for _, _, _, ghosts in self.cuts]

    def _of_samples(self, numbers: Tensor) -> Tensor:
        """Every sample's numbers, of shape (N, C)."""
        result = numbers.new_empty(self.samples, self.channels)
        for block, part in zip(self._cut(result, 1), self._by_cut(numbers), strict=True):
            block.copy_(part)
        return result

    def _as_channels(self, planes: list[Tensor]) -> Tensor:
        """Every plane as a channel of one sample."""
        return planes[0].view(1, self.samples * self.channels, self.points)

    def _parts(self, blocks: list[Tensor]) -> Iterator[Tensor]:
        """The stretches as (rows, C), in the samples' order."""
        for block, (outer, ghosts, _, _) in zip(blocks, self.cuts, strict=True):
            yield from block.view(outer * ghosts, -1, self.channels).unbind()

    def _moments_by_stretch(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The ghosts' mean and biased variance from those of their stretches, by the law of total variance."""
        moments = [aten.batch_norm_update_stats(part, None, None, 0.0) for part in self._parts(x)]
        means, variances = map(torch.stack, zip(*moments, strict=True))
        if self.grouping == "contiguous":
            return means, variances
        mean = self._ghost_means(self._cut(means, 1))
        variances.add_((means - self._of_samples(mean)).square_())
        return mean, self._ghost_means(self._cut(variances, 1))


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel the sums of ``grad * (x - mean)`` and of ``grad``, in one pass."""
    one = torch.ones_like(mean)
    mask = [False, True, True]
    _, product, plain = aten.native_batch_norm_backward(grad, x, one, mean, one, None, None, False, 0.0, mask)
    return product, plain
