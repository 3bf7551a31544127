"""A pass of our own over a trainer's training data, which leaves the live loaders, samplers and iterators alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

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
        if not isinstance(loader, DataLoader):
            if self._loader is None or isinstance(loader, Iterator):
                # It may be an iterator, or hold one, or a loader whose workers serve one iterator at a time.
                raise MisconfigurationException(
                    f"The training data is a {type(loader).__name__}, not a DataLoader, and reading it might take "
                    f"batches away from training: {_CURE}."
                )
            return loader  # type: ignore[no-any-return]
        if type(loader).__iter__ is not DataLoader.__iter__ and not type(loader).__module__.startswith("torchdata"):
            raise MisconfigurationException(
                f"The training loader is a {type(loader).__name__}, which iterates in its own way and cannot be "
                f"rebuilt: {_CURE}."
            )
        settings: dict[str, Any] = {
            "collate_fn": loader.collate_fn,
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "generator": torch.Generator().manual_seed(0),
        }
        if loader.num_workers > 0:
            settings["prefetch_factor"] = loader.prefetch_factor
        if isinstance(loader.dataset, IterableDataset):
            # Workers have copies of their own; without workers the live iterator shares the object.
            dataset = loader.dataset if loader.num_workers else _copy(loader.dataset, "data set")
            return DataLoader(dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **settings)
        batch_sampler = loader.batch_sampler
        sampler, size, drop_last = loader.sampler, loader.batch_size, loader.drop_last
        if type(batch_sampler) is BatchSampler:  # torch's own: the loader's, or one that the user made
            sampler, size, drop_last = batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
        elif batch_sampler is not None:
            batch_sampler = _rewound(_copy(batch_sampler, "batch sampler", loader.dataset))
            return DataLoader(loader.dataset, batch_sampler=batch_sampler, **settings)
        if not _is_plain(sampler):
            sampler = _rewound(_copy(sampler, "sampler", loader.dataset))
            return DataLoader(loader.dataset, batch_size=size, sampler=sampler, drop_last=drop_last, **settings)
        indices = self._share(loader, sampler)
        if size is None:
            return DataLoader(loader.dataset, batch_size=None, sampler=indices, **settings)
        return DataLoader(loader.dataset, batch_sampler=_chunks(indices, size, drop_last), **settings)

    def _shuffles(self, sampler: Any) -> bool:
        """Whether to shuffle: always, but where training sees only the first batches of an ordered loader."""
        ordered = isinstance(sampler, SequentialSampler) or not getattr(sampler, "shuffle", True)
        return not (ordered and self._is_limited())

    def _share(self, loader: DataLoader[Any], sampler: Any) -> list[int]:
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


def _is_plain(sampler: Any) -> bool:
    """Whether the sampler draws every sample once, in plain or random order."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler._num_samples is None
    return type(sampler) is SequentialSampler or (
        isinstance(sampler, DistributedSampler) and (type(sampler).__iter__ is DistributedSampler.__iter__)
    )


def _chunks(indices: list[int], size: int, drop_last: bool) -> list[list[int]]:
    """Batches of this size. A last batch of one sample, which some layers cannot normalise, joins the one before."""
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    if len(chunks) > 1 and len(chunks[-1]) < size:
        if drop_last:
            del chunks[-1]
        elif len(chunks[-1]) == 1:
            chunks[-2:] = [chunks[-2] + chunks[-1]]
    return chunks


def _copy(value: Any, what: str, dataset: Any = None) -> Any:
    """A copy with a state of its own; the data set stays shared."""
    try:
        return copy.deepcopy(value, {} if dataset is None else {id(dataset): dataset})
    except Exception as error:
        raise MisconfigurationException(
            f"The {what} of the training loader ({type(value).__name__}) cannot be copied ({error}), and iterating it "
            f"would disturb training: {_CURE}."
        ) from error


def _rewound(sampler: Any) -> Any:
    """The sampler at the beginning of an epoch: a resumable one was copied in the middle, or at the end, of one."""
    if hasattr(sampler, "__len__"):
        # One more than there are, so that it notices the end.
        for _ in itertools.islice(sampler, len(sampler) + 1):
            pass
    return sampler


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
