"""The moment at which DistributedDataParallel has given every rank the buffers of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

__all__ = ["AfterBroadcast"]


class AfterBroadcast:
    """Calls a function once, when the module inside a DistributedDataParallel is called next.

    Its forward begins by sending rank 0's buffers to all, so that what another rank's layers remembered before is not
    what the step begins with. Nothing is called where the model is not wrapped so, or is wrapped somewhere else, and
    where a part of it is compiled, since hooks do not fire there.

    Args:
        model: as it is called in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inside = None if _is_compiled(model) else _inside(model)
        self._handle: RemovableHandle | None = None

    def call(self, function: Callable[[], object]) -> None:
        """Call the function at the next forward, in the place of what was to be called there."""
        self.close()

        def hook(*_: Any) -> None:
            self.close()
            function()

        if self._inside is not None:
            self._handle = self._inside.register_forward_pre_hook(hook)

    def close(self) -> None:
        """Leave no hook behind."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _inside(model: nn.Module) -> nn.Module | None:
    return next(
        (m.module for m in model.modules() if isinstance(m, DistributedDataParallel) and m.broadcast_buffers), None
    )


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in model.modules()
    )
