"""What BatchNormSwap asks of a trainer before it swaps."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from bnkit import ranks
from bnkit.norms import Domain, Spec

__all__ = ["check_freezing", "check_trainer", "loader_batch"]


def check_trainer(trainer: Trainer, specs: Iterable[Spec]) -> None:
    """Refuse what a fit with swapped layers cannot go with.

    Raises:
        MisconfigurationException: for sharded parameters, for Lightning's own synchronization, and for ``Domain`` in
            processes whose model does not come back.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"BatchNormSwap is not known to work with parameters that are sharded by "
            f"{type(trainer.strategy).__name__}: train with DDP, or swap the model by bnkit.swap before."
        )
    if any(getattr(owner, "_layer_sync", None) for owner in (trainer.strategy, trainer._accelerator_connector)):
        raise MisconfigurationException(
            "Trainer(sync_batchnorm=True) would replace the layers that BatchNormSwap has swapped: leave it out, "
            "and use BatchNormSwap(bnkit.norms.Sync()) for the layers to synchronize."
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and any(
        isinstance(spec, Domain) for spec in specs
    ):
        raise MisconfigurationException(
            "Domain adds keys to the state_dict, which the main process, whose model is not swapped, could not "
            "load after ddp_spawn or ddp_fork: call bnkit.swap(model, rules) before fit, or use strategy='ddp'."
        )


def loader_batch(trainer: Trainer) -> int:
    """Samples in a batch of the training loader.

    Raises:
        MisconfigurationException: where the loaders do not say, or differ.
    """
    loaders = [leaf for leaf in tree_leaves(trainer.train_dataloader) if leaf is not None]
    sizes = {
        getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if isinstance(loader, DataLoader)
        else getattr(loader, "batch_size", None)
        for loader in loaders
    }
    size = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(size, int):
        raise MisconfigurationException(
            "NormBatch depends on the samples in a device's batch, which cannot be known from the training loader "
            f"({', '.join(type(loader).__name__ for loader in loaders)}): give BatchNormSwap(device_batch=...)."
        )
    everywhere = [int(row[0]) for row in ranks.all_gather_numbers((size,))]
    if len(set(everywhere)) > 1:
        raise MisconfigurationException(
            f"NormBatch depends on the samples in a device's batch, and the ranks differ in theirs: {everywhere}."
        )
    return size


def check_freezing(trainer: Trainer, *, unfreezes: bool) -> None:
    """Refuse a schedule that changes which parameters learn in a way that DistributedDataParallel would not notice."""
    if unfreezes:
        raise MisconfigurationException(
            "DistributedDataParallel does not synchronize parameters that begin to learn after Frozen(affine=False): "
            "schedule Frozen(affine=True) instead."
        )
    if not getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
        raise MisconfigurationException(
            "DistributedDataParallel would wait for ever for the gradients of parameters that Frozen(affine=False) "
            "freezes during training: schedule Frozen(affine=True), or use "
            "strategy='ddp_find_unused_parameters_true'."
        )
