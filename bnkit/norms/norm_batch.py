"""The normalization batch size: one knob along the axis of scope, from a ghost batch to all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from bnkit.norms.ghost import Ghost, ghost_sizes
from bnkit.norms.spec import Context, Spec
from bnkit.norms.sync import Sync

__all__ = ["NormBatch"]


@dataclass(frozen=True)
class NormBatch(Spec):
    """Batch normalization over ``size`` samples, whatever the device's batch and the number of ranks.

    It resolves to [`bnkit.norms.Ghost`][] below the device's batch, to plain BatchNorm at it and to
    [`bnkit.norms.Sync`][] over sub-groups of ranks above it, and is resolved anew where one of these numbers changes.

    Warning:
        Below the device's batch, a size that does not divide it gives ghosts whose sizes differ by one, as
        [`bnkit.norms.Ghost`][] has it. Above the global batch, no normalization by the batch can have that many
        samples.

    Training and inference: those of the layer it resolves to.

    Source: Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 4.

    Args:
        size: the normalization batch size in samples, at least 1.
        rounding: where ``size`` is above the device's batch and no sub-group of ranks has it: "error" refuses and names
            the sizes that can be had; "nearest" takes the nearest of them, of two the smaller.
    """

    size: int
    rounding: Literal["error", "nearest"] = "error"

    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"NormBatch's size is a number of samples, an int of at least 1, not {self.size!r}.")
        if self.rounding not in ("error", "nearest"):
            raise ValueError(f"NormBatch's rounding is 'error' or 'nearest', not {self.rounding!r}.")

    def resolve(self, context: Context) -> Spec | None:
        """Ghost, Sync, or None for plain BatchNorm.

        Raises:
            ValueError: where the device's batch is not known, where the size is above the global batch, and where no
                sub-group of ranks has the size.
        """
        batch, ranks = context.device_batch, context.world_size
        if batch is None or batch < 1:
            raise ValueError(f"{self} depends on the device's batch size, which is not known: give it as device_batch.")
        if self.size < batch:
            return Ghost(self.size)
        if self.size > batch * ranks:
            raise ValueError(
                f"{self} asks for more samples than the global batch of {batch * ranks} has, {ranks} ranks of {batch}: "
                "use Renorm, Group or Frozen, which do not depend on the batch, or a larger batch."
            )
        sizes = [batch * group for group in range(1, ranks + 1) if ranks % group == 0]
        size = min(sizes, key=lambda candidate: (abs(candidate - self.size), candidate))
        if size != self.size and self.rounding == "error":
            raise ValueError(
                f"{self} cannot be met exactly with {ranks} ranks of {batch} samples: choose one of "
                f"{', '.join(map(str, sizes))}, or rounding='nearest'."
            )
        if size == batch:
            return None
        return Sync() if size == batch * ranks else Sync(size // batch)

    def explain(self, context: Context) -> str:
        """One line for the log: what the knob resolves to here, and why.

        Raises:
            ValueError: as ``resolve``.
        """
        batch, ranks = context.device_batch or 0, context.world_size
        spec = self.resolve(context)
        if isinstance(spec, Ghost):
            sizes = sorted(set(ghost_sizes(batch, self.size)))
            found = f"{spec}: ghosts of {' or '.join(map(str, sizes))} samples"
        elif isinstance(spec, Sync):
            group = spec.group_size or ranks
            found = f"{spec}: {group} ranks of {batch} samples, {group * batch} together"
        else:
            found = f"plain BatchNorm: {batch} samples, the device's batch"
        return f"NormBatch({self.size}) with {ranks} x {batch} samples is {found}."
