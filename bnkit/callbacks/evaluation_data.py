"""A pass of our own over one of the loaders that a trainer validates, tests or predicts, which leaves it alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from bnkit.callbacks.own_loaders import own_loader

__all__ = ["EvaluationData", "loader_names"]

_CURE = (
    "give the trainer a DataLoader whose data set can be read twice (say, one over a list of the batches with "
    "batch_size=None), or leave BatchNormAdaptation out and call bnkit.recalibrate(model, batches) yourself"
)


class EvaluationData:
    """The batches of one loader, as the step gets them, as often as one likes.

    A new loader is built over the same data set. Of a loader in plain or shuffled order it reads the samples that the
    loop reads (the trainer's ``limit_…_batches`` included), each once, in a random order of fixed seed: batches by
    which layers normalise should not be of one class each because the data are sorted. Each rank reads its own share.
    Any other sampler, and an iterable data set, is copied, state and all, and read in its order. Batches take
    Lightning's way: precision conversion and the three transfer hooks.

    Args:
        trainer: in validate, test or predict, with its loaders set up.
        pl_module: the module whose transfer hooks are used.
        index: which loader; 0 where several are read at once (a ``CombinedLoader`` that is not sequential).

    Raises:
        MisconfigurationException: where a loader cannot be read without taking batches away from the trainer.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, index: int) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.index = index
        self._live, self._limits = _loaders(trainer)
        self._chosen = [index] if self._live._mode == "sequential" else list(range(len(self._live.flattened)))
        self._own_loaders()  # raise now

    def __iter__(self) -> Iterator[Any]:
        return map(self._transferred, self._batches())

    def _transferred(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.pl_module._on_before_batch_transfer(batch, dataloader_idx=self.index)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=self.index)

    def _batches(self) -> Iterator[Any]:
        if self._live._mode == "sequential":
            limit = self._limits[self.index]
            return itertools.islice(self._own_loaders()[0], None if limit == math.inf else int(limit))
        combined = CombinedLoader(self._live.iterables, self._live._mode)
        combined.flattened = self._own_loaders()
        combined.limits = list(self._limits)
        return (batch for batch, _, _ in combined)

    def _own_loaders(self) -> list[DataLoader[Any]]:
        assert self.trainer.state.fn is not None
        what = _WHAT[self.trainer.state.fn]
        return [
            own_loader(
                self._live.flattened[index], functools.partial(_share, self._limits[index]), what=what, cure=_CURE
            )
            for index in self._chosen
        ]


def _share(limit: float, loader: DataLoader[Any], sampler: Any, size: int | None) -> list[int]:
    """The indices that the loop takes of this loader on this rank, each once, in a random order of fixed seed."""
    order = torch.arange(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, RandomSampler) or getattr(sampler, "shuffle", False):
        order = _shuffled(order)
    if isinstance(sampler, DistributedSampler):
        order = order[sampler.rank :: sampler.num_replicas]
    if limit != math.inf:
        order = order[: int(limit) * (size or 1)]
    return _shuffled(order).tolist()


def _shuffled(order: torch.Tensor) -> torch.Tensor:
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]


_WHAT = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "prediction"}


def loader_names(trainer: Trainer) -> list[int | str]:
    """The loaders of the loop that the trainer runs: the keys of a dict of loaders, the positions of others.

    Raises:
        MisconfigurationException: where the step itself takes the batches (``dataloader_iter``) of several loaders.
    """
    live, _ = _loaders(trainer)
    if live._mode != "sequential":
        return [0]
    if len(live.flattened) > 1 and isinstance(_loop(trainer)._data_fetcher, _DataLoaderIterDataFetcher):
        raise MisconfigurationException(
            "BatchNormAdaptation cannot tell when a step that takes dataloader_iter goes over to the next of several "
            "loaders: let the step take a batch, or hand over one loader at a time."
        )
    if isinstance(live.iterables, dict) and len(live.iterables) == len(live.flattened):
        return list(live.iterables)
    return list(range(len(live.flattened)))


def _loop(trainer: Trainer) -> Any:
    loops = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    assert trainer.state.fn is not None
    return loops[trainer.state.fn]


def _loaders(trainer: Trainer) -> tuple[CombinedLoader, list[float]]:
    """The live loaders, and how many batches of each this rank takes at most."""
    loop = _loop(trainer)
    combined: CombinedLoader = loop._combined_loader
    return combined, loop.max_batches
