"""Acting right before or after a LightningModule's own hooks, at moments that have no callback hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

__all__ = ["ModuleHooks"]


class ModuleHooks:
    """Wraps hooks of a module for a time: as attributes of the instance, which ``unwrap`` takes away again."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[LightningModule, str, Any, Any]] = []

    def wrap(
        self,
        pl_module: LightningModule,
        hook: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Call ``before`` with the hook's arguments before each call of the hook, and ``after`` after it."""
        original = getattr(pl_module, hook)

        @functools.wraps(original)  # by which Lightning sees whether the user has overridden it
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                after()
            return result

        self._wrapped.append((pl_module, hook, wrapped, pl_module.__dict__.get(hook)))
        pl_module.__dict__[hook] = wrapped

    def unwrap(self, *copies: Any) -> None:
        """Give the hooks back, also those of copies that were made of the module meanwhile."""
        for pl_module, hook, wrapped, own in reversed(self._wrapped):
            for module in (pl_module, *copies):
                if module.__dict__.get(hook) is wrapped:
                    if own is None:
                        del module.__dict__[hook]
                    else:
                        module.__dict__[hook] = own
        self._wrapped.clear()
