"""The order in which a trainer runs its callbacks."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["run_after_other_callbacks", "run_before_other_callbacks"]


def run_after_other_callbacks(callback: Callback, trainer: Trainer) -> None:
    """Let a callback run after all others but the checkpoints, wherever the user listed it.

    To be called in ``setup``. The trainer gets a new list, since it is going through the old one at that time.
    """
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    checkpoints = [other for other in others if isinstance(other, Checkpoint)]
    trainer.callbacks = [*(other for other in others if other not in checkpoints), callback, *checkpoints]  # type: ignore[attr-defined]


def run_before_other_callbacks(callback: Callback, trainer: Trainer) -> None:
    """Let a callback run before all others, wherever the user listed it.

    To be called in ``setup``. The trainer gets a new list, since it is going through the old one at that time.
    """
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]
