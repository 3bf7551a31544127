"""What the layers normalise in the current batch: the readings that recalibration pools."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.layers import keeps_forward
from bnkit.moments import Moments
from bnkit.observation import Reading, Source, reduced
from bnkit.stand_ins import is_foreign

__all__ = ["CurrentBatch", "Reached"]

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


class CurrentBatch:
    """The readings of the current batch on this rank."""

    def __init__(self, layers: Mapping[str, _BatchNorm], ends_forward: bool) -> None:
        self.layers = layers
        self.sources: dict[str, Source] = {}
        self._channels = torch.tensor([layer.num_features for layer in layers.values()])
        self._readings: dict[str, list[Reading]] = {}
        self._is_recorded = False
        self._statistics: Tensor | None = None
        self._own_is_good: dict[str, bool] = {}
        self._checked: dict[str, int] = {}
        # Calls that leave their statistics in the layer until the batch ends: elements of the largest input for which
        # these are exact enough, and of this batch's.
        self._sizes: dict[str, int] = {}
        self._left: dict[str, int] = {}
        # Of the last batch all of whose statistics were left in the layers: as a rule the next one is like it.
        self._usual: dict[str, int] | None = None
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._tensors: list[Tensor] = []
        self._columns = torch.empty(0)
        self._is_batch_norm: dict[str, bool] = {}
        self._ends_forward = ends_forward
        self._clear()

    def wants_input(self, name: str) -> bool:
        """Whether the layer's own statistics are known to be not exact enough."""
        return not self._own_is_good.get(name, True)

    def before(self, name: str) -> None:
        """A call is to come, and overwrites what the one before has left in the layer."""
        if name in self._left:
            self._fetch(name, copied=True)

    def glance(self, name: str, layer: _BatchNorm, x: Tensor) -> bool:
        """Whether a call has left its statistics in the layer, exact enough, to be fetched when the batch ends.

        That is most of the calls, and nearly all that reading them costs.
        """
        size, now = self._sizes.get(name), layer._buffers
        if size is None or x.numel() > size or not layer.training or layer.momentum != 1:
            return False
        mean, var = self._buffers[name]
        if now["running_mean"] is not mean or now["running_var"] is not var:
            return False  # others for this call, as torch.func.functional_call has them
        self._left[name] = x.numel()
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
                    assert layer.running_mean is not None
                    assert layer.running_var is not None
                    self._sizes[name], self._buffers[name] = x.numel(), (layer.running_mean, layer.running_var)
        self._readings.setdefault(name, []).append(read)
        self._is_recorded = True
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
        self._is_recorded = False
        self._left = {}
        self._statistics = None

    def gathered(self) -> tuple[Tensor, Tensor]:
        """What the batch adds to the totals: float64 on the CPU, by one transfer, all layers one after the other.

        Returns:
            Means and variances, the latter as the layers have them, shape (2, C); 0 for a layer that was not reached.
            And shape (3, C): values, share of a batch that they are, and what to multiply the variances by to get sums
            of squared deviations.
        """
        if self._statistics is None:
            if self._is_recorded or self._left != self._usual:
                self._gather_anew()
            self._statistics = torch.cat(self._tensors).cpu().double().view(2, -1)
        return self._statistics, self._columns

    def nonfinite(self) -> str | None:
        """A layer with a statistic of this batch that is not finite: the first of the forward, as a rule."""
        if bool(self.gathered()[0].isfinite().all()):
            return None
        self._fetch_all()
        return next(
            name
            for name, reads in self._readings.items()
            for read in reads
            if not bool(torch.isfinite(read.mean).all() & torch.isfinite(read.var).all())
        )

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
        values = self._left.pop(name) // self.layers[name].num_features
        mean, var = self._buffers[name]  # the layer may have others by now
        if copied:
            mean, var = mean.clone(), var.clone()
            self._is_recorded = True
        self._readings.setdefault(name, []).append(Reading("layer", values, mean, var, 1, 1 - 1 / values))

    def _fetch_all(self) -> None:
        for name in list(self._left):
            self._fetch(name)

    def _gather_anew(self) -> None:
        self._usual = None if self._is_recorded else dict(self._left)
        self._fetch_all()
        reads = [self._one(name) for name in self.layers]
        nothing = [torch.zeros(channels, dtype=torch.float64) for channels in self._channels.tolist()]
        means = [zero if read is None else read.mean for read, zero in zip(reads, nothing, strict=True)]
        variances = [zero if read is None else read.var for read, zero in zip(reads, nothing, strict=True)]
        self._tensors = means + variances
        if len({tensor.device for tensor in self._tensors}) > 1:
            self._tensors, self._usual = [tensor.cpu() for tensor in self._tensors], None
        counts = [(r.values, 1 / r.group_size, r.values * r.bias) if r else (0, 0, 0) for r in reads]
        columns = torch.tensor(counts, dtype=torch.float64).repeat_interleave(self._channels, dim=0)
        self._columns = columns.T.contiguous()

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
