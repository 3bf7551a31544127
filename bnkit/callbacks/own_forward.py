"""How a callback runs the user's module for a purpose of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from bnkit.feeding import Forward, default_forward
from bnkit.preservation import undoing

__all__ = ["nothing_logged", "own_forward"]


def own_forward(trainer: Trainer, forward: Forward | None) -> Forward:
    """The user's forward, or the default one, in the trainer's precision and with nothing logged.

    What a module's forward logs by ``self.log`` is meant for its steps: between the hooks of a callback, Lightning
    would mix it with theirs, or refuse it.
    """

    def run(model: nn.Module, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context(), nothing_logged(model):
            return (forward or default_forward)(model, batch)

    return run


@contextmanager
def nothing_logged(model: nn.Module) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` of the LightningModules in the model do nothing."""
    modules = [module for module in model.modules() if isinstance(module, LightningModule)]
    kept = [(module, name, module.__dict__.get(name)) for module in modules for name in ("log", "log_dict")]

    def undo() -> None:
        for module, name, own in kept:
            if own is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = own

    with undoing(undo):
        for module, name, _ in kept:
            module.__dict__[name] = _log_nothing
        yield


def _log_nothing(*_: Any, **__: Any) -> None:
    pass
