"""Loaders of our own over the data of a trainer's loader, whose samplers, iterators and workers they leave alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper, _IndexBatchSamplerWrapper
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from bnkit.preservation import random_states_preserved

__all__ = ["chunks", "own_loader"]

Share = Callable[[DataLoader[Any], Any, int | None], list[int]]
"""A function of a loader, its sampler (of plain or random order) and its batch size (None: the data set's items are the
batches), which returns this rank's indices in the order to read them."""


def own_loader(loader: Any, share: Share, *, what: str, cure: str) -> DataLoader[Any]:
    """A loader of our own over the same data, in batches of the same size.

    Where the live one draws every sample once, in plain or random order, ``share`` says which to read and how (a last
    batch of one sample joins the one before). Any other sampler, and an iterable data set, is copied, state and all.

    Args:
        loader: the live loader.
        share: which samples to read.
        what: whose data it is, for the errors: ``"training"``, ``"test"``, ...
        cure: what to do about it, for the errors.

    Raises:
        MisconfigurationException: where it is no DataLoader, iterates in its own way, or something cannot be copied.
    """
    if not isinstance(loader, DataLoader):
        # It may be an iterator, or hold one, or a loader whose workers serve one iterator at a time.
        raise MisconfigurationException(
            f"The {what} data is a {type(loader).__name__}, not a DataLoader, and reading it might take "
            f"batches away from the {what}: {cure}."
        )
    if type(loader).__iter__ is not DataLoader.__iter__ and not type(loader).__module__.startswith("torchdata"):
        raise MisconfigurationException(
            f"The {what} loader is a {type(loader).__name__}, which iterates in its own way and cannot be "
            f"rebuilt: {cure}."
        )

    def copied(value: Any, part: str, dataset: Any = None) -> Any:
        """A copy with a state of its own; the data set stays shared."""
        try:
            return copy.deepcopy(value, {} if dataset is None else {id(dataset): dataset})
        except Exception as error:
            raise MisconfigurationException(
                f"The {part} of the {what} loader ({type(value).__name__}) cannot be copied ({error}), and iterating "
                f"it would disturb the {what}: {cure}."
            ) from error

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
        dataset = loader.dataset if loader.num_workers else copied(loader.dataset, "data set")
        return DataLoader(dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **settings)
    batch_sampler: Any = loader.batch_sampler
    if isinstance(batch_sampler, _IndexBatchSamplerWrapper):  # Lightning's, in predict: it remembers what it drew
        batch_sampler = batch_sampler._batch_sampler
    sampler, size, drop_last = loader.sampler, loader.batch_size, loader.drop_last
    if type(batch_sampler) is BatchSampler:  # torch's own: the loader's, or one that the user made
        sampler, size, drop_last = batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    elif batch_sampler is not None:
        batch_sampler = _rewound(copied(batch_sampler, "batch sampler", loader.dataset))
        return DataLoader(loader.dataset, batch_sampler=batch_sampler, **settings)
    if not _is_plain(sampler, loader.dataset):
        sampler = _rewound(copied(sampler, "sampler", loader.dataset))
        return DataLoader(loader.dataset, batch_size=size, sampler=sampler, drop_last=drop_last, **settings)
    indices = share(loader, sampler, size)
    if size is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=indices, **settings)
    return DataLoader(loader.dataset, batch_sampler=chunks(indices, size, drop_last), **settings)


def chunks(indices: list[int], size: int, drop_last: bool) -> list[list[int]]:
    """Batches of this size. A last batch of one sample, which some layers cannot normalise, joins the one before."""
    found = [indices[start : start + size] for start in range(0, len(indices), size)]
    if len(found) > 1 and len(found[-1]) < size:
        if drop_last:
            del found[-1]
        elif len(found[-1]) == 1:
            found[-2:] = [found[-2] + found[-1]]
    return found


def _is_plain(sampler: Any, dataset: Any) -> bool:
    """Whether the sampler draws every sample of the data set once, in plain or random order."""
    if isinstance(sampler, UnrepeatedDistributedSamplerWrapper):  # Lightning's, in predict on several devices
        return _is_plain(sampler.dataset._sampler, dataset)  # type: ignore[attr-defined]
    if isinstance(sampler, DistributedSampler):
        return type(sampler).__iter__ is DistributedSampler.__iter__ and _are_all(sampler.dataset, dataset)
    if type(sampler) is RandomSampler and (sampler.replacement or sampler._num_samples is not None):
        return False
    return type(sampler) in (RandomSampler, SequentialSampler) and _are_all(sampler.data_source, dataset)


def _are_all(source: Any, dataset: Any) -> bool:
    """Whether a sampler made for ``source``, such as ``range(100)``, draws from the whole data set."""
    return source is dataset or len(source) == len(dataset)


def _rewound(sampler: Any) -> Any:
    """The sampler at the beginning of an epoch: a resumable one was copied in the middle, or at the end, of one."""
    if hasattr(sampler, "__len__"):
        with random_states_preserved(nn.Identity()):  # most samplers draw from the global generators
            # One more than there are, so that it notices the end.
            for _ in itertools.islice(sampler, len(sampler) + 1):
                pass
    return sampler
