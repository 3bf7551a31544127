"""Ghost batches: the exact estimator over a scope narrower than the device's batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bnkit.norms.base import Scoped
from bnkit.norms.ghost_calls import GhostCalls, Grouping, sizes
from bnkit.norms.ghost_passes import GhostPasses, can_pass
from bnkit.norms.spec import Spec

__all__ = ["Ghost", "GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "ghost_count", "ghost_sizes"]


class _Ghost(Scoped):
    """Normalises each ghost batch by its own statistics; see [`bnkit.norms.Ghost`][]."""

    def _is_device_batch(self, input: Tensor) -> bool:  # noqa: A002
        return self._count(input) == 1

    def parts_of(self, samples: int) -> int:
        """The number of ghosts."""
        return ghost_count(samples, self.spec.size)

    def _count(self, x: Tensor) -> int:
        return ghost_count(x.shape[0], self.spec.size, one_value_each=x.shape[2:].numel() == 1)

    def _normalize(self, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # noqa: A002
        count, grouping = self._count(input), self.spec.grouping
        running = self.running_mean if self.track_running_stats else None
        if can_pass(input, self.weight, self.bias, running):
            result: tuple[Tensor, Tensor | None, Tensor | None] = GhostPasses.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.bias, self.eps, count, grouping, running is not None
            )
            return result
        return GhostCalls(count, grouping, self.weight, self.bias, self.eps, running)(input)


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """Ghost batch normalization over (N, C) or (N, C, L); see [`bnkit.norms.Ghost`][]."""


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """Ghost batch normalization over (N, C, H, W); see [`bnkit.norms.Ghost`][]."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """Ghost batch normalization over (N, C, D, H, W); see [`bnkit.norms.Ghost`][]."""


@dataclass(frozen=True)
class Ghost(Spec):
    r"""Batch normalization over ghost batches of about ``size`` samples of the device's batch.

    $$y_i = \gamma \frac{x_i - \mu_{g(i)}}{\sqrt{\sigma_{g(i)}^2 + \epsilon}} + \beta$$

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
        grouping: which samples share a ghost. "strided": sample i is in ghost ``i mod k``; "contiguous": consecutive
            samples, the faster of the two on large channels_last tensors.
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
    return sizes(samples, ghost_count(samples, size))
