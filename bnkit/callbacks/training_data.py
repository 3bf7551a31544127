"""A pass of our own over a trainer's training data, which leaves the live loaders, samplers and iterators alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from bnkit.callbacks.own_loaders import own_loader

__all__ = ["TrainingData"]

_CURE = "pass BatchNormRecalibration(dataloader=...) a loader of its own"


class TrainingData:
    """The trainer's training batches, as ``training_step`` gets them, as often as one likes.

    New loaders are built over the same data sets. A loader in plain or shuffled order becomes a shuffled one of fixed
    seed, no sample twice, each rank with the share that it trains on (a last batch of one sample joins the one before);
    any other sampler is copied, state and all. Batches take Lightning's way: precision conversion and the three
    transfer hooks, with the trainer in its training stage, since people augment there.

    Args:
        trainer: in fit.
        pl_module: the module whose transfer hooks are used.
        loader: instead of the trainer's own: a loader, a collection of loaders, or a function that returns one. Every
            rank takes its share of it.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, loader: Any = None) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return map(self._transferred, self._batches())

    def _transferred(self, batch: Any) -> Any:
        with _training_stage(self.trainer, self.pl_module):
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = self.pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def check(self) -> None:
        """Raise now, not after an epoch of training, if the loaders cannot be rebuilt."""
        self._own_loaders()

    def _batches(self) -> Iterator[Any]:
        batches = self._own_loaders()
        if isinstance(batches, CombinedLoader):
            batches = (batch for batch, _, _ in batches)
        limit = self.trainer.num_training_batches if self._loader is None and self._is_limited() else float("inf")
        return itertools.islice(batches, None if limit == float("inf") else int(limit))

    def _own_loaders(self) -> Iterable[Any]:
        mode = "max_size_cycle"
        if self._loader is None:
            loader = self.trainer.train_dataloader
            live = self.trainer.fit_loop._combined_loader
            mode = mode if live is None else live._mode
        else:
            loader = self._loader() if callable(self._loader) else self._loader
        if isinstance(loader, CombinedLoader):
            loader, mode = loader.iterables, loader._mode
        # What Lightning is given in a list are loaders; what we are given in one may be the batches themselves.
        several = isinstance(loader, dict) or (
            isinstance(loader, list | tuple)
            and (self._loader is None or any(isinstance(leaf, DataLoader) for leaf in tree_leaves(loader)))
        )
        if several:
            return CombinedLoader(
                tree_map(self._own, loader, is_leaf=lambda leaf: not isinstance(leaf, dict | list | tuple)),
                mode,  # type: ignore[arg-type]
            )
        return self._own(loader)

    def _is_limited(self) -> bool:
        limit = self.trainer.limit_train_batches
        all_of_them = limit is None or (isinstance(limit, float) and limit == 1.0)  # 1 is one batch
        return self.trainer.overfit_batches > 0 or not all_of_them  # type: ignore[attr-defined]

    def _own(self, loader: Any) -> Iterable[Any]:
        """A loader of our own over the same data."""
        if self._loader is not None and not isinstance(loader, DataLoader | Iterator):
            return loader  # type: ignore[no-any-return]
        return own_loader(loader, self._share, what="training", cure=_CURE)

    def _shuffles(self, sampler: Any) -> bool:
        """Whether to shuffle: always, but where training sees only the first batches of an ordered loader."""
        ordered = isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True)
        return not (ordered and self._is_limited())

    def _share(self, loader: DataLoader[Any], sampler: Any, size: int | None) -> list[int]:
        """This rank's share of the indices: every index on one rank, uneven where it does not come out even."""
        length = len(loader.dataset)  # type: ignore[arg-type]
        order = torch.arange(length)
        if self._shuffles(sampler):
            order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
        if isinstance(sampler, DistributedSampler):
            rank, ranks = sampler.rank, sampler.num_replicas
        elif self._loader is None:
            rank, ranks = 0, 1  # in training, too, every rank has all of its loader
        else:
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return order[rank::ranks].tolist()


class _training_stage:  # noqa: N801  (used as a function)
    """What ``self.trainer.training`` and ``self.training`` say inside the transfer hooks."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer
        self.pl_module = pl_module

    def __enter__(self) -> None:
        self.was = self.trainer.state.stage, self.pl_module.training
        self.trainer.state.stage, self.pl_module.training = RunningStage.TRAINING, True

    def __exit__(self, *_: object) -> None:
        self.trainer.state.stage, self.pl_module.training = self.was
