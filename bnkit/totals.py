"""The running totals of one pass over the data: what recalibration pools, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

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
        self.pooled = Moments.cat([Moments.empty(layer.num_features) for layer in layers.values()])
        self.channels = torch.tensor([layer.num_features for layer in layers.values()])
        self._readings: dict[str, list[Reading]] = {}
        self._batch: tuple[Tensor, Tensor] | None = None
        self._own_is_good: dict[str, bool] = {}
        self._checked: dict[str, int] = {}
        self._is_batch_norm: dict[str, bool] = {}
        self._ends_forward = ends_forward
        self._clear()

    def wants_input(self, name: str) -> bool:
        """Whether the layer's own statistics are known to be not exact enough."""
        return not self._own_is_good.get(name, True)

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
        self._batch = None

    def nonfinite(self) -> str | None:
        """The first layer, in the order of the forward, with a statistic of this batch that is not finite."""
        means, variances = self._gathered()
        if bool(torch.isfinite(means).all() & torch.isfinite(variances).all()):
            return None
        return next(
            name
            for name, reads in self._readings.items()
            for read in reads
            if not bool(torch.isfinite(read.mean).all() & torch.isfinite(read.var).all())
        )

    def add(self) -> None:
        """Add this batch to the totals: one packed transfer, one pooling for all layers."""
        reads = [self._one(name) for name in self.layers]
        per_layer = torch.tensor(
            [(read.values, 1 / read.group_size, read.bias) if read else (0, 0, 1) for read in reads],
            dtype=torch.float64,
        )
        count, share, bias = per_layer.repeat_interleave(self.channels, dim=0).unbind(1)
        means, variances = self._gathered()
        self.pooled += Moments(count, means, variances * bias, batches=share)

    def discard(self) -> None:
        """Forget this batch; with momentum 1 a NaN would otherwise stay (0 times NaN is NaN)."""
        self._clear()

    def _clear(self) -> None:
        for layer in self.layers.values():
            if layer.training and keeps_forward(layer):
                layer.running_mean.zero_()  # type: ignore[union-attr]
                layer.running_var.zero_()  # type: ignore[union-attr]

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

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Means and variances of all layers one after the other, in float64 on the CPU; 0 for a layer not reached."""
        if self._batch is None:
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
            means, variances = torch.cat(flat).cpu().double().chunk(2)
            self._batch = means, variances.clamp_min(0)
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
