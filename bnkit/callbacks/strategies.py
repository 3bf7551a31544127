"""Which of a trainer's strategies the callbacks can work with."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

__all__ = ["refuse_sharding"]


def refuse_sharding(callback: Callback, trainer: Trainer) -> None:
    """Refuse strategies under which no rank has a layer's parameters whole.

    Raises:
        MisconfigurationException: for FSDP, DeepSpeed and model parallelism.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"{type(callback).__name__} cannot read layers whose parameters are sharded by "
            f"{type(trainer.strategy).__name__}: train with DDP, or leave the callback out."
        )
