"""What stands in for a layer whose own forward cannot run here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.layers import keeps_forward
from bnkit.norms import Variant
from bnkit.preservation import undoing

__all__ = ["is_foreign", "stand_ins", "waits_for_ranks"]


@contextmanager
def stand_ins(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Let ``torch.nn.SyncBatchNorm`` layers on the CPU normalise by this process's batch: torch's own refuse to."""
    synchronized = [layer for layer in layers.values() if type(layer) is nn.SyncBatchNorm and _on_cpu(layer)]

    def undo() -> None:
        for layer in synchronized:
            layer.__class__ = nn.SyncBatchNorm

    with undoing(undo):
        for layer in synchronized:
            layer.__class__ = _LocalBatchNorm  # type: ignore[assignment]
        yield


class _LocalBatchNorm(_BatchNorm):
    """BatchNorm of any rank >= 2, in the place of a synchronized one."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (torch's name)
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def is_foreign(layer: _BatchNorm) -> bool:
    """Whether the layer has a forward of its own that is neither torch's nor ours."""
    return not keeps_forward(layer) and not isinstance(layer, Variant)


def _on_cpu(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_mean.device.type == "cpu"


def waits_for_ranks(layer: _BatchNorm) -> bool:
    """Whether the layer's training forward waits for other ranks."""
    if isinstance(layer, Variant):
        return layer.waits_for_ranks and ranks.world_size() > 1
    return isinstance(layer, nn.SyncBatchNorm) and not _on_cpu(layer) and ranks.world_size(layer.process_group) > 1
