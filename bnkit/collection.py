"""One pass over the data that pools what the layers normalise: the engine of recalibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.current_batch import CurrentBatch, Reached
from bnkit.feeding import Forward, feed, samples_in
from bnkit.layers import batch_norm_layers, keeps_forward, tracks_statistics
from bnkit.moments import Moments
from bnkit.norms import Variant
from bnkit.observation import Source, reading
from bnkit.stand_ins import is_foreign, waits_for_ranks
from bnkit.totals import Totals

__all__ = ["Collected", "Collector", "kinds"]

# The spread of fewer batch means is too rough an estimate to stop by.
_FEWEST_BATCHES = 4


@dataclass(frozen=True, eq=False)
class Collected:
    """What a pass has seen, over all ranks."""

    layers: dict[str, Moments]  # of the layers that were reached, on the CPU
    sources: dict[str, Source]  # of this rank
    unknown: set[str]  # layers that normalise something else than their input
    samples: int
    batches: int
    skipped: int

    def with_layers_of(self, other: Collected) -> Collected:
        """The layers of both, the counts of this one."""
        return replace(
            self,
            layers=self.layers | other.layers,
            sources=self.sources | other.sources,
            unknown=self.unknown | other.unknown,
        )


@dataclass(frozen=True)
class Collector:
    """The arguments of [`bnkit.recalibrate`][] that say how to go over the data."""

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward | None
    max_samples: int | None
    tolerance: float | None
    skip_nonfinite: bool
    process_group: dist.ProcessGroup | None
    progress: bool

    def collect(self, layers: Mapping[str, _BatchNorm], calls: int | None = None, label: str = "") -> Collected:
        """Pool what these layers normalise over the data.

        Args:
            layers: the layers by name.
            calls: None: the layers are in training mode and the whole forward is run. Else there is one layer, which
                normalises as at inference, and each forward ends once that layer was called this often. (A layer that
                is called more often has itself upstream: it stays in training mode, and the whole forward is run.)
            label: of the progress bar.
        """
        for module in self.model.modules():
            module.training = False
        for layer in layers.values():
            layer.training = calls is None or calls > 1 or is_foreign(layer)
            # An update by 1 leaves the batch's statistics alone in the running ones. An update by 0 leaves those alone,
            # which another forward than torch's own may normalise by.
            layer.momentum = 1.0 if keeps_forward(layer) or is_foreign(layer) else 0.0
        current = CurrentBatch(layers, ends_forward=calls == 1)
        totals = Totals(sum(layer.num_features for layer in layers.values()))
        lockstep = any(waits_for_ranks(layer) for layer in layers.values() if layer.training)
        samples = batches = skipped = skipped_samples = own_batches = 0
        iterator: Iterator[Any] | None = None
        failure: BaseException | None = None
        batch: Any = None
        with (
            reading(layers, current.record, by_input=current.wants_input, before=current.before, glance=current.glance),
            self._bar(label) as bar,
        ):
            while True:
                has_batch, arriving = False, 0
                try:
                    if failure is None:
                        iterator = iter(self.batches) if iterator is None else iterator
                        batch = next(iterator, _END)
                        has_batch = batch is not _END
                        arriving = samples_in(batch) if has_batch else 0
                except BaseException as error:
                    failure = error
                with ranks.preferring(failure):
                    rows = ranks.all_gather_numbers((failure is not None, has_batch, arriving), self.process_group)
                if any(row[0] for row in rows):
                    ranks.raise_together("Recalibration", failure, self.process_group)
                present, arriving = sum(int(row[1]) for row in rows), sum(int(row[2]) for row in rows)
                if not present or (lockstep and present < len(rows)):
                    break
                if self.max_samples is not None and batches and samples + arriving > self.max_samples:
                    break
                if self.tolerance is not None and batches and self._is_known(totals.pooled, self.tolerance):
                    break
                if has_batch:
                    current.begin()
                    try:
                        with suppress(Reached):
                            feed(self.model, batch, own_batches, self.forward)
                    except BaseException as error:
                        if lockstep:
                            # The others wait inside of a layer, for a message of another size than the ones here.
                            raise
                        failure = error
                    try:
                        if failure is None and not self._add(current, totals, own_batches):
                            skipped, skipped_samples = skipped + 1, skipped_samples + samples_in(batch)
                    except BaseException as error:
                        failure = error
                    own_batches += 1
                samples, batches = samples + arriving, batches + present
                bar.update(arriving)
        lost = ranks.all_gather_numbers((skipped, skipped_samples), self.process_group)
        skipped, skipped_samples = (int(sum(column)) for column in zip(*lost, strict=True))
        if not batches:
            raise _no_batches()
        if skipped == batches:
            raise ValueError(
                f"Every one of the {batches} batches gave a statistic that is not finite: look at the data."
            )
        merged = totals.pooled.all_reduce(self.process_group).split([layer.num_features for layer in layers.values()])
        reached = {name: moments for name, moments in zip(layers, merged, strict=True) if moments.count > 0}
        unknown = set().union(*ranks.all_gather_object(current.unknown, self.process_group))
        for name in unknown:
            reached.pop(name, None)
        return Collected(reached, current.sources, unknown, samples - skipped_samples, batches - skipped, skipped)

    def order(self, layers: Mapping[str, _BatchNorm]) -> dict[str, int]:
        """The layers in the order in which a forward of the first batch reaches them -> calls in that forward."""
        calls: dict[str, int] = {}

        def count(name: str, *_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        for module in self.model.modules():
            module.training = False
        failure: BaseException | None = None
        batch: Any = _END
        try:
            batch = next(iter(self.batches), _END)
            if batch is not _END:
                with reading(layers, count):
                    feed(self.model, batch, 0, self.forward)
        except BaseException as error:
            failure = error
        ranks.raise_together("Recalibration", failure, self.process_group)
        if not any(ranks.all_gather_object(batch is not _END, self.process_group)):
            raise _no_batches()
        merged: dict[str, int] = {}
        for theirs in ranks.all_gather_object(calls, self.process_group):
            merged |= {name: max(number, merged.get(name, 0)) for name, number in theirs.items()}
        return merged

    def _add(self, current: CurrentBatch, totals: Totals, index: int) -> bool:
        """Pool what the layers normalised in the forward; False where that was not finite and is left out."""
        culprit = current.nonfinite()
        if culprit is None:
            totals.add(*current.gathered())
            return True
        if self.skip_nonfinite:
            current.discard()
            return False
        raise FloatingPointError(
            f"Batch {index} gives the BatchNorm layer {culprit!r} statistics that are not finite: look for NaN or "
            'infinity in the data and the weights, or pass on_nonfinite="skip" to leave such batches out.'
        )

    def _is_known(self, pooled: Moments, tolerance: float) -> bool:
        everywhere = pooled.all_reduce(self.process_group)
        assert everywhere.batches is not None
        known = everywhere.standard_error <= tolerance * everywhere.std
        # A layer that is not reached stays unknown, and keeps nothing waiting.
        return bool((known & (everywhere.batches >= _FEWEST_BATCHES) | (everywhere.count == 0)).all())

    def _bar(self, label: str) -> AbstractContextManager[Any]:
        if not self.progress or ranks.rank(self.process_group) != 0:
            return nullcontext(_NoBar)
        from tqdm.auto import tqdm  # ships with Lightning; only those who want a bar pay for its import

        bar: AbstractContextManager[Any] = tqdm(
            desc=f"Recalibrating {label}".rstrip(), total=self.max_samples, unit=" samples", leave=False
        )
        return bar


def kinds(model: nn.Module) -> dict[str, object]:
    """What ranks must have in common of their layers to send each other messages of one length, in one order."""
    layers = batch_norm_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BatchNorm layers to recalibrate.")
    return {
        f"layer {name!r}": f"{type(layer).__name__} of {layer.num_features} channels"
        + (f" by {layer.spec}" if isinstance(layer, Variant) else "")
        + ("" if tracks_statistics(layer) else " without running statistics")
        for name, layer in layers.items()
    }


class _NoBar:
    @staticmethod
    def update(samples: int) -> None:
        """Show nothing."""


_END = object()


def _no_batches() -> ValueError:
    return ValueError(
        "There was no batch to recalibrate from: the loader is empty, or an iterator that was used up before "
        "(pass a list or a DataLoader)."
    )
