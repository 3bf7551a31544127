"""The running totals of one pass over the data: what recalibration pools, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.layers import keeps_forward
from bnkit.moments import Moments
from bnkit.observation import Reading, Source, reduced
from bnkit.stand_ins import is_foreign

__all__ = ["Reached", "Totals"]

# A layer's own batch statistics are used where they agree with float64 ones to this: the variance relatively, the mean
# in standard deviations. Kernels accumulate in float32; far from 0, or over many values, some of them are worse.
_VAR_AGREEMENT = 5e-7
_MEAN_AGREEMENT = 1e-4
# Whether they are of the same values at all.
_SAME_VAR, _SAME_MEAN = 0.02, 0.02
# Batches to pool at a time.
_PARTS = 16
# They are not even checked for a mean within this many standard deviations of 0, and sums of so few values.
_NEAR_ZERO = 30
_SHORT_SUM = 512


class Reached(BaseException):
    """Raised to end a forward once its layer has been reached; no ``except Exception`` of a model stops it."""


class Totals:
    """The running totals of one pass on this rank, and the readings of the current batch."""

    def __init__(self, layers: Mapping[str, _BatchNorm], ends_forward: bool) -> None:
        self.layers = layers
        self.sources: dict[str, Source] = {}
        self._pooled = Moments.cat([Moments.empty(layer.num_features) for layer in layers.values()])
        self._channels = torch.tensor([layer.num_features for layer in layers.values()])
        self._readings: dict[str, list[Reading]] = {}
        self._batch: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._shape: tuple[tuple[float, float, float], ...] = ()
        self._columns = torch.empty(0)
        self._own_is_good: dict[str, bool] = {}
        self._checked: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._is_batch_norm: dict[str, bool] = {}
        self._ends_forward = ends_forward
        self._clear()

    @property
    def pooled(self) -> Moments:
        """All batches so far, layer after layer."""
        if self._parts:
            counts, shares, biases = torch.stack([columns for columns, _ in self._parts], dim=1)
            means, variances = torch.stack([statistics for _, statistics in self._parts], dim=1)
            self._pooled += Moments.pool_stacked(counts, means, variances.clamp_min(0) * biases, shares)
            self._parts = []
        return self._pooled

    def wants_input(self, name: str) -> bool:
        """Whether the layer's own statistics are known to be not exact enough."""
        return not self._own_is_good.get(name, True)

    def glance(self, name: str, x: Any) -> bool:
        """Whether the call to come leaves its statistics in the layer, exact enough, to be fetched when the batch ends.

        That is most of the calls, and nearly all that reading them costs.
        """
        if name in self._left:
            self._fetch(name, copied=True)  # the call to come overwrites them
        size = self._sizes.get(name)
        if size is None or not isinstance(x, Tensor) or x.numel() > size:
            return False
        self._left[name] = x.numel()
        self._readings.setdefault(name, [])  # its place in the order of the forward
        return True

    def record(self, name: str, read: Reading, x: Tensor) -> None:
        """Take note of one call of a layer in the current batch."""
        layer = self.layers[name]
        if is_foreign(layer) and not self._is_understood(name, layer, read):
            return
        if read.source == "layer" and read.group_size == 1 and read.values > self._checked.get(name, 0):
            # Not every batch: those of one layer are alike but for their size. (Where they are not, the variance
            # between them, which is pooled in float64, outweighs what the kernel loses.)
            if _is_doubtful(read, x):
                exact = reduced(x)
                self._own_is_good[name] = _agrees(read, exact)
                read = exact
            if bool(read.mean.isfinite().all()):
                self._checked[name] = read.values
                if not (self.wants_input(name) or self._ends_forward) and layer.training and layer.momentum == 1:
                    self._sizes[name] = x.numel()
        self._readings.setdefault(name, []).append(read)
        if self._ends_forward:
            raise Reached

    @property
    def unknown(self) -> set[str]:
        """Layers whose own forward normalises something else than their input."""
        return {name for name, known in self._is_batch_norm.items() if not known}

    def _is_understood(self, name: str, layer: _BatchNorm, read: Reading) -> bool:
        """Whether a class that we do not know has updated its running statistics to those of its input."""
        if name not in self._is_batch_norm:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            own = Reading("layer", read.values, layer.running_mean, layer.running_var, 1, 1 - 1 / read.values)
            self._is_batch_norm[name] = not layer.training or _agrees(own, read, _SAME_VAR, _SAME_MEAN)
            layer.momentum = 0.0  # from now on it keeps what it may normalise by
        return self._is_batch_norm[name]

    def begin(self) -> None:
        """Start a batch."""
        self._readings = {}
        self._left = {}
        self._batch = None

    def nonfinite(self) -> str | None:
        """The first layer, in the order of the forward, with a statistic of this batch that is not finite."""
        if bool(self._gathered().isfinite().all()):
            return None
        return next(
            name
            for name, reads in self._readings.items()
            for read in reads
            if not bool(torch.isfinite(read.mean).all() & torch.isfinite(read.var).all())
        )

    def add(self) -> None:
        """Add this batch to the totals."""
        statistics = self._gathered()
        reads = [self._one(name) for name in self.layers]
        shape = tuple((read.values, 1 / read.group_size, read.bias) if read else (0, 0, 1) for read in reads)
        if shape != self._shape:  # as a rule it is that of the batch before
            per_layer = torch.tensor(shape, dtype=torch.float64)
            self._shape, self._columns = shape, per_layer.repeat_interleave(self._channels, dim=0).T
        self._parts.append((self._columns, statistics))
        if len(self._parts) >= _PARTS:
            _ = self.pooled

    def discard(self) -> None:
        """Forget this batch; with momentum 1 a NaN would otherwise stay (0 times NaN is NaN)."""
        self._clear()

    def _clear(self) -> None:
        for layer in self.layers.values():
            if layer.training and keeps_forward(layer):
                layer.running_mean.zero_()  # type: ignore[union-attr]
                layer.running_var.zero_()  # type: ignore[union-attr]

    def _fetch(self, name: str, copied: bool = False) -> None:
        """Read what the last call of a layer has left in it."""
        layer = self.layers[name]
        values = self._left.pop(name) // layer.num_features
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        if copied:
            mean, var = mean.clone(), var.clone()
        self._readings[name].append(Reading("layer", values, mean, var, 1, 1 - 1 / values))

    def _one(self, name: str) -> Reading | None:
        """All calls of a layer in this batch as one reading: they are parts of one batch."""
        reads = self._readings.get(name)
        if not reads:
            return None
        self.sources[name] = reads[-1].source
        if len(reads) > 1:
            pooled = Moments.pool([read.moments().to("cpu") for read in reads])
            merged = Reading(
                reads[-1].source, sum(read.values for read in reads), pooled.mean, pooled.var, reads[-1].group_size
            )
            self._readings[name] = [merged]
        return self._readings[name][0]

    def _gathered(self) -> Tensor:
        """Means and variances, shape (2, C), of all layers one after the other; 0 for a layer not reached.

        In float64 on the CPU, by one transfer.
        """
        if self._batch is None:
            for name in list(self._left):
                self._fetch(name)
            pairs = []
            for name, layer in self.layers.items():
                read = self._one(name)
                if read is None:
                    nothing = torch.zeros(layer.num_features, dtype=torch.float64)
                    pairs.append((nothing, nothing))
                else:
                    pairs.append((read.mean, read.var))
            flat = [tensor for pair in zip(*pairs, strict=True) for tensor in pair]
            if len({tensor.device for tensor in flat}) > 1:
                flat = [tensor.cpu() for tensor in flat]
            self._batch = torch.cat(flat).cpu().double().view(2, -1)
        return self._batch


def _is_doubtful(own: Reading, x: Tensor) -> bool:
    """Whether the layer's own statistics may be less exact than they should be, and are worth a check.

    Those of a tensor in (N, C, ...) order on the CPU are sums in float64. Other kernels sum in float32: in doubt where
    the sums are long, and everywhere on a device that we know less of.
    """
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or bool((own.mean.square() > _NEAR_ZERO**2 * own.var).any())
    ):
        return True
    return own.values > _SHORT_SUM and (x.ndim == 2 or not x.is_contiguous())


def _agrees(
    own: Reading, exact: Reading, var_tolerance: float = _VAR_AGREEMENT, mean_tolerance: float = _MEAN_AGREEMENT
) -> bool:
    mean, var, exact_mean, exact_var = (t.cpu().double() for t in (own.mean, own.var, exact.mean, exact.var))
    var = var * own.bias
    return bool(
        ((var - exact_var).abs() <= var_tolerance * exact_var).all()
        & ((mean - exact_mean).abs() <= mean_tolerance * exact_var.sqrt()).all()
    )
