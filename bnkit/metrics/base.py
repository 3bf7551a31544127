"""What the metrics share: states in float64, Moments pooled over updates and ranks, a reference to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from bnkit.moments import Moments
from bnkit.shift import EPS

__all__ = ["ComparisonMetric", "Float64Metric", "PooledMetric", "first", "pack", "pool", "unpack"]


class Float64Metric(Metric):
    """A metric whose states stay in float64: a count of values does not fit into half precision."""

    is_differentiable = False
    full_state_update = True  # of two references the last one counts, which no reduction of two states can tell

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Any:  # noqa: ARG002
        # What torchmetrics calls for .to(), .half() and the like: follow to another device, not to another dtype.
        self._computed = None
        super()._apply(fn, exclude_state=list(self._defaults))
        # A device without float64 leaves them where they are.
        states = self._device if self._device.type != "mps" else torch.device("cpu")
        for name, default in self._defaults.items():
            assert isinstance(default, Tensor)
            self._defaults[name] = default.to(states)
            setattr(self, name, getattr(self, name).to(states))
        return self


class PooledMetric(Float64Metric):
    """Base of the measures of what was observed. The state: its Moments, packed."""

    observed: Tensor  # (5, C): count, mean, variance, batches, between

    def __init__(self, num_channels: int, eps: float = EPS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_channels < 1:
            raise ValueError(f"num_channels is the layer's number of channels, at least 1, not {num_channels!r}.")
        if not eps >= 0:
            raise ValueError(f"eps is the layer's eps, at least 0, not {eps!r}.")
        self.num_channels, self.eps = num_channels, eps
        self.add_state("observed", pack(Moments.empty(num_channels)), dist_reduce_fx=pool)

    def update(self, observed: Moments) -> None:
        """Pool what was observed, such as one of [`bnkit.observe`][]'s Moments, with what was before."""
        self._check(observed)
        self.observed = pool(torch.stack((self.observed, pack(observed).to(self.observed.device))))

    def _check(self, moments: Moments) -> None:
        if not isinstance(moments, Moments):
            raise TypeError(
                f"{type(self).__name__}.update takes bnkit.Moments, not a {type(moments).__name__}: "
                "give Moments.of(activation), or what bnkit.observe() yields."
            )
        if len(moments.mean) != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}(num_channels={self.num_channels}) got Moments of {len(moments.mean)} channels: "
                "make one metric for each layer."
            )

    def _known(self, values: Tensor) -> Tensor:
        """The values, and NaN for channels of which nothing was observed."""
        return values.to(torch.float64).masked_fill(self.observed[0] == 0, math.nan)


class ComparisonMetric(PooledMetric):
    """Base of the measures of two Moments; the last reference counts, of several ranks the lowest one's.

    Args:
        num_channels: C.
        eps: the layer's eps.
        kwargs: torchmetrics' own.
    """

    reference: Tensor  # (3, C): whether there is one, mean, variance
    _measure: ClassVar[staticmethod[[Moments, Moments, float], Tensor]]

    def __init__(self, num_channels: int, eps: float = EPS, **kwargs: Any) -> None:
        super().__init__(num_channels, eps, **kwargs)
        self.add_state("reference", torch.zeros(3, num_channels, dtype=torch.float64), dist_reduce_fx=first)

    def update(self, observed: Moments, reference: Moments) -> None:  # type: ignore[override]
        """Pool what was observed, and keep the reference to compare it with (a count of 0: keep the one before)."""
        self._check(reference)
        super().update(observed)
        row = torch.stack([(reference.count > 0).expand_as(reference.mean), reference.mean, reference.var])
        row = row.to(self.reference.device)
        self.reference = torch.where(row[0] > 0, row, self.reference)

    def compute(self) -> Tensor:
        """The measure, shape (C,), float64."""
        values = type(self)._measure(unpack(self.observed), Moments(*self.reference), self.eps)
        return self._known(values).masked_fill(self.reference[0] == 0, math.nan)


def pack(moments: Moments) -> Tensor:
    """All fields in one tensor of shape (5, C)."""
    assert moments.batches is not None
    assert moments.between is not None
    rows = (moments.count, moments.mean, moments.var, moments.batches, moments.between)
    return torch.stack([row.expand_as(moments.mean) for row in rows])


def unpack(packed: Tensor) -> Moments:
    """Undo ``pack``."""
    return Moments(*packed)


def pool(packed: Tensor) -> Tensor:
    """Of (parts, 5, C), over updates or over ranks."""
    return pack(Moments.pool([unpack(part) for part in packed]))


def first(states: Tensor) -> Tensor:
    """Of (ranks, 3, C), the lowest rank's that has been given one, which the first row tells."""
    given = (states[:, 0] > 0).any(1).tolist()
    return states[given.index(True)] if any(given) else states[0]
