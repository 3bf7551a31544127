"""Moments: count, mean and variance per channel, the one currency of bnkit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bnkit import ranks

__all__ = ["Moments", "to_float64"]

# A reduction converts its input to float64, and one over ranks has all of theirs: slices of this many elements bound
# those copies to 128 MiB.
_SLICE_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    r"""The count, mean and variance of what a layer normalised, per channel, in float64.

    Two of them pool without loss by the law of total variance (Chan, Golub & LeVeque 1983):

    $$
    n = n_a + n_b, \qquad \mu = \mu_a + \delta \frac{n_b}{n}, \qquad
    n \sigma^2 = n_a \sigma_a^2 + n_b \sigma_b^2 + \delta^2 \frac{n_a n_b}{n}, \qquad \delta = \mu_b - \mu_a
    $$

    Every term is a sum of non-negative ones, so the variance is never negative, and no large squares cancel, as they do
    in $E[x^2] - E[x]^2$.

    The part of the variance that lies *between* the pooled batches is kept beside it: the spread of the batch means
    tells how well the pooled mean is known (see ``standard_error``). Activations of one batch are correlated
    (pixels of an image are), so $\sigma / \sqrt{n}$ would be far too small.

    Args:
        count: number of values per channel; float64 scalar, >= 0. One per channel, shape (C,), where several layers
            were concatenated with ``cat``.
        mean: mean per channel, float64, shape (C,).
        var: biased (population) variance per channel, float64, shape (C,), >= 0.
        batches: number of batches that were pooled; float64, the shape of ``count``. Default: 1, and 0 where the count
            is 0.
        between: sum over the batches of count times squared deviation of the batch mean from the pooled mean, float64,
            shape (C,). Default: 0.

    Raises:
        ValueError: where shapes differ, or a count or a variance is negative.
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    batches: Tensor | None = None
    between: Tensor | None = None

    def __post_init__(self) -> None:
        mean, var = to_float64(self.mean), to_float64(self.var)
        count = to_float64(self.count).to(mean.device)
        if mean.ndim != 1 or mean.shape != var.shape or count.shape not in ((), mean.shape):
            raise ValueError(
                "Moments wants mean and var of one shape (C,) and a scalar count, but got "
                f"{tuple(mean.shape)}, {tuple(var.shape)} and {tuple(count.shape)}."
            )
        # Values are checked where looking at them costs no device synchronization.
        if mean.device.type == "cpu" and bool((count < 0).any() | (var < 0).any()):
            raise ValueError("Moments wants a count and variances that are not negative.")
        empty = count == 0
        # An empty part says nothing, whatever its mean holds (0/0 gives NaN): make it the neutral element.
        mean, var = mean.masked_fill(empty, 0.0), var.masked_fill(empty, 0.0)
        batches = (~empty).to(torch.float64) if self.batches is None else to_float64(self.batches).to(mean.device)
        between = torch.zeros_like(mean) if self.between is None else to_float64(self.between).to(mean.device)
        for field, value in (
            ("count", count),
            ("mean", mean),
            ("var", var),
            ("batches", batches),
            ("between", between),
        ):
            object.__setattr__(self, field, value)

    @classmethod
    def of(cls, x: Tensor, channel_dim: int = 1) -> Moments:
        """The Moments of an activation, reduced over every dimension but the channels'.

        Args:
            x: real tensor of any rank >= 2, such as (N, C) or (N, C, H, W), on any device and of any dtype.
            channel_dim: the dimension of the channels.

        Raises:
            ValueError: where ``x`` has fewer than two dimensions or is complex.
        """
        if x.ndim < 2 or x.is_complex():
            raise ValueError(
                f"Moments.of wants a real activation of two dimensions or more, such as (N, C), but got "
                f"{x.dtype} of shape {tuple(x.shape)}."
            )
        x = x.detach().movedim(channel_dim, 1)
        channels = x.shape[1]
        if x.numel() == 0:
            return cls.empty(channels, x.device)
        rows = max(1, _SLICE_ELEMENTS // (x.numel() // x.shape[0]))
        pooled = cls.pool([_reduce(part) for part in torch.split(x, rows)])
        return cls(pooled.count, pooled.mean, pooled.var)

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """The neutral element of pooling: a count of 0 for this many channels."""
        device = device if _has_float64(torch.device(device or "cpu")) else "cpu"
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(()), zeros, zeros)

    @classmethod
    def pool(cls, parts: Iterable[Moments]) -> Moments:
        """The Moments of all parts together; parts with a count of 0 change nothing.

        Raises:
            ValueError: where there are no parts, or their channels differ.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Moments.pool wants at least one part: of none, the channels are not known.")
        if len({part.mean.shape for part in parts}) > 1:
            raise ValueError(f"Moments.pool wants one number of channels, got {[len(part.mean) for part in parts]}.")
        if len(parts) == 1:
            return parts[0]
        device = parts[0].mean.device
        per_channel = any(part.count.ndim for part in parts)
        packed = torch.stack([part._packed().to(device) for part in parts], dim=1)
        return _pool_packed(packed, per_channel)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments.pool([self, other])

    def all_reduce(self, process_group: dist.ProcessGroup | None = None) -> Moments:
        """Pool over the ranks of a process group, by one collective of one packed tensor (several, where it is long).

        Exact for uneven and for empty ranks. All ranks pool the same gathered bits in the same order, so that all of
        them get the same bits. Every rank of the group must call it, with the same channels. Without an initialized
        process group it returns itself.

        Args:
            process_group: the ranks to pool over; default: all.
        """
        number = ranks.world_size(process_group)
        if number == 1:
            return self
        packed, per_channel = self._packed(), self.count.ndim > 0
        # Every rank's numbers lie here side by side: of a thousand ranks and as many channels, in slices.
        parts = torch.split(packed, max(1, _SLICE_ELEMENTS // (len(packed) * number)), dim=1)
        pooled = [
            _pool_packed(torch.stack(ranks.all_gather(part, process_group), dim=1), per_channel) for part in parts
        ]
        if len(pooled) == 1:
            return pooled[0]
        whole = Moments.cat(pooled)
        return whole if per_channel else whole.split([len(self.mean)])[0]

    @classmethod
    def cat(cls, layers: Sequence[Moments]) -> Moments:
        """Several layers' Moments one after the other, to pool or reduce them in one go; see ``split``."""
        return cls(*torch.cat([layer._packed() for layer in layers], dim=1))

    def split(self, channels: Sequence[int]) -> list[Moments]:
        """Undo ``cat``: one Moments for each number of channels."""
        packed = torch.split(self._packed(), list(channels), dim=1)
        return [Moments(rows[0, 0], rows[1], rows[2], rows[3, 0], rows[4]) for rows in packed]

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel (biased), shape (C,)."""
        return self.var.sqrt()

    @property
    def standard_error(self) -> Tensor:
        r"""Standard error of the pooled mean, from the spread of the batch means, shape (C,).

        With B batches of $n_b$ values, $\sqrt{\frac{\sum_b n_b (\mu_b - \mu)^2}{(B - 1)\, n}}$: the
        between-batch mean square of a one-way analysis of variance. It holds for batches drawn independently; batches
        in an order (sorted by class, by time) make it too large or too small. Infinite where fewer than two batches
        were pooled: nothing is known then.
        """
        assert self.batches is not None
        assert self.between is not None
        error = (self.between / ((self.batches - 1) * self.count).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return error.masked_fill(self.batches < 2, torch.inf)

    def to(self, device: torch.device | str) -> Moments:
        """The same Moments on another device."""
        return Moments(*(row.to(device) for row in (self.count, self.mean, self.var, self.batches, self.between)))  # type: ignore[union-attr]

    def __repr__(self) -> str:
        count = "per channel" if self.count.ndim else f"{self.count.item():g}"
        return f"Moments(count={count}, channels={len(self.mean)}, batches={self.batches})"

    def _packed(self) -> Tensor:
        """All fields in one tensor of shape (5, C)."""
        assert self.batches is not None
        assert self.between is not None
        columns = (self.count, self.mean, self.var, self.batches, self.between)
        return torch.stack([column.expand_as(self.mean) for column in columns])


def _pool_packed(parts: Tensor, per_channel: bool) -> Moments:
    """Pool over dimension 1 of (5, parts, C)."""
    counts, means, variances, batches, between = parts
    count = counts.sum(0)
    # Deviations from one of the means, not from 0, so that a mean far from 0 costs no digits.
    origin = means.gather(0, counts.argmax(0, keepdim=True))
    weights = counts / count.clamp_min(1)
    mean = origin[0] + (weights * (means - origin) * (counts > 0)).sum(0)
    spread = counts * (means - mean).square()
    var = (weights * variances).sum(0) + spread.sum(0) / count.clamp_min(1)
    pooled_batches = batches.sum(0)
    if not per_channel:
        count, pooled_batches = count[0], pooled_batches[0]
    return Moments(count, mean, var, pooled_batches, between.sum(0) + spread.sum(0))


def _reduce(x: Tensor) -> Moments:
    """The Moments of one slice with the channels in dimension 1."""
    dims = [0, *range(2, x.ndim)]
    count = torch.tensor(x.numel() // x.shape[1], dtype=torch.float64)
    if _has_float64(x.device):
        var, mean = torch.var_mean(x.to(torch.float64), dim=dims, correction=0)
        return Moments(count, mean, var)
    # Without float64: centre by a first estimate of the mean, so that what is squared is small, then say in float64
    # (on the CPU) how far that estimate was off.
    x = x.float()
    first = x.mean(dims, keepdim=True)
    centred = x - first
    rest = centred.mean(dims).cpu().double()
    return Moments(
        count,
        first.flatten().cpu().double() + rest,
        (centred.square().mean(dims).cpu().double() - rest**2).clamp_min(0),
    )


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def to_float64(value: Tensor | float) -> Tensor:
    """In float64, on the same device if that has it, else on the CPU."""
    tensor = torch.as_tensor(value).detach()
    if not _has_float64(tensor.device):
        tensor = tensor.cpu()
    return tensor.to(torch.float64)
