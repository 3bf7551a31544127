"""Monitor: every layer's activation shift at every training step, for next to nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.layers import batch_norm_layers
from bnkit.moments import Moments
from bnkit.monitoring.after_broadcast import AfterBroadcast
from bnkit.monitoring.alarms import Alarm
from bnkit.monitoring.dropout_comparison import compare_variances, dropout_before
from bnkit.monitoring.input_samples import InputSampler, nonfinite_since
from bnkit.monitoring.normalized_together import with_batch_size
from bnkit.monitoring.snapshot import LayerMeasures, Snapshot, from_samples, from_steps, measure_samples
from bnkit.monitoring.step_measures import LayerState, StepMeasures, StepRows
from bnkit.monitoring.step_recorder import why_not_recorded
from bnkit.monitoring.watch import AlarmWatch, SeenStep
from bnkit.norms import Variant

__all__ = ["Monitor", "check_arguments"]

_CAPACITY = 64


class Monitor:
    """Watches what every BatchNorm layer normalises in training, against its running statistics and its own past.

    Around each training forward call ``before`` and ``after``; every ``every_n_steps`` steps ``after`` returns
    a [`bnkit.monitoring.Snapshot`][]. Between them the device is never waited for: one packed transfer a snapshot. The
    model is only read, so training is bit-identical to training without it; compiled models are neither broken nor
    recompiled.

    Batch statistics are recovered from the step that the running statistics take (see
    ``bnkit.monitoring.step_recorder.StepRecorder``). Layers that take none (frozen ones,
    ``track_running_stats=False``) have their input reduced at some steps, by hooks that stand for that step alone. A
    layer called several times in a step is seen as the average of its calls, and its noise is that of the average.

    Batches of different sizes (the last of an epoch) scatter by different amounts: where ``samples`` is told at each
    step, the divergence is judged per sample.

    Args:
        model: the model, or a LightningModule; DistributedDataParallel and torch.compile wrappers are looked through.
            A DistributedDataParallel wrapper must be given, not the module inside: it replaces the buffers of all ranks
            but the first as its forward begins. Where parts are compiled too, only rank 0's measures are to be trusted.
        every_n_steps: from one snapshot to the next.
        input_every_n_steps: from one reduction of inputs to the next; None: never, for models with compiled parts.
        false_alarms_per_1000_steps: how many alarms of shifted batch statistics, over all layers, to put up with where
            nothing is wrong.
        window: steps that a layer's usual spread is learnt from.
        noise_level: in standard deviations; ``normalization_batch_size`` says how many samples would bring a layer's
            noise down to it.
        across_ranks: average the measures over all ranks, by one collective a snapshot in which all must take part.
            Otherwise they are those of this rank's batches.
        process_group: those ranks; default: all.

    Raises:
        TypeError, ValueError: an argument out of its range; a scripted model, lazy layers (see
            ``bnkit.layers.batch_norm_layers``).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> monitor = Monitor(model, every_n_steps=10)
        >>> for step in range(10):
        ...     monitor.before()
        ...     _ = model(torch.randn(32, 4))
        ...     snapshot = monitor.after(step)
        >>> snapshot.layers["1"].source
        'layer'
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every_n_steps: int = 50,
        input_every_n_steps: int | None = 20,
        false_alarms_per_1000_steps: float = 0.1,
        window: int = 100,
        noise_level: float = 0.1,
        across_ranks: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_arguments(every_n_steps, input_every_n_steps, false_alarms_per_1000_steps, window, noise_level)
        self.model = model
        self.every_n_steps = every_n_steps
        self.input_every_n_steps = input_every_n_steps
        self.across_ranks = across_ranks
        self.process_group = process_group
        self.noise_level = noise_level
        self.seconds = 0.0
        """CPU time spent here so far."""
        self.layers = batch_norm_layers(model)
        self._after_broadcast = AfterBroadcast(model)
        self._watch = AlarmWatch(list(self.layers), rate=false_alarms_per_1000_steps / 1000, window=window)
        self._sources: dict[str, str] = {}
        self._groups: list[StepMeasures] = []
        self._sampler = InputSampler({})
        self._count = 0  # steps seen
        self._handed_out = 0  # alarms, by new_alarms
        self._seen: list[SeenStep] = []  # of those since the last snapshot
        self._without_dropout: Mapping[str, Moments] | None = None
        self.dropout_shift: dict[str, float] = {}
        self.refresh()

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return self._watch.alarms

    def new_alarms(self) -> list[Alarm]:
        """The alarms since the last call, none after most steps: ``for alarm in monitor.new_alarms(): …``."""
        new = self.alarms[self._handed_out :]
        self._handed_out += len(new)
        return new

    def refresh(self) -> None:
        """Look at the layers anew: some may have been frozen, swapped or moved since. Each snapshot does so too."""
        sources = {name: self._source(layer) for name, layer in self.layers.items()}
        if sources == self._sources and all(group.recorder.is_current for group in self._groups):
            return
        carried, pending = self._learnt()
        samples = self._sampler.samples
        self._sampler.close()
        self._sources = sources
        self._sampler = InputSampler({name: self.layers[name] for name, source in sources.items() if source == "input"})
        self._sampler.samples |= {name: kept for name, kept in samples.items() if name in self._sampler.layers}
        by_kind: dict[tuple[torch.device, torch.dtype], dict[str, _BatchNorm]] = {}
        for name, layer in self.layers.items():
            if sources[name] == "layer" and layer.running_mean is not None:
                kind = (layer.running_mean.device, layer.running_mean.dtype)
                by_kind.setdefault(kind, {})[name] = layer
        capacity = min(_CAPACITY, self.every_n_steps)
        self._groups = [StepMeasures(layers, capacity) for layers in by_kind.values()]
        for group in self._groups:
            group.carry(carried, pending)

    def before(self) -> None:
        """To be called before a training step's forward; a second call before the same step replaces the first."""
        began = time.thread_time()
        self._look_before()
        self._after_broadcast.call(self._look_before)
        if self._sampler.layers and self.input_every_n_steps:
            # Four times as often, until there are enough samples of each layer to judge.
            every = self.input_every_n_steps if self._sampler.has_enough else max(1, self.input_every_n_steps // 4)
            if self._count % every == 0:
                self._sampler.open(self._count)
        self.seconds += time.thread_time() - began

    def after(self, step: int, samples: int | None = None) -> Snapshot | None:
        """To be called after a training step.

        Args:
            step: the step's number, as in the logs.
            samples: in this rank's batch; None where not known, and then no batch size is told.

        Returns:
            A snapshot, every ``every_n_steps`` steps.
        """
        began = time.thread_time()
        self._after_broadcast.close()
        if self._sampler.layers:
            self._sampler.close()
        for group in self._groups:
            # A step to compare is the first since the last digest: see compare_with.
            if group.recorder.after() and self._without_dropout is None:
                group.digest()
        if self._without_dropout is not None:
            self._compare_dropout(step)
        self._seen.append(SeenStep(self._count, step, samples))
        self._count += 1
        snapshot = self.snapshot() if self._count % self.every_n_steps == 0 else None
        self.seconds += time.thread_time() - began
        return snapshot

    def compare_with(self, without_dropout: Mapping[str, Moments]) -> None:
        """Compare the step that begins now with what its batch looks like without dropout.

        Args:
            without_dropout: by layer, such as ``train_eval_gap(…).seen``; the difference is in ``dropout_shift`` after
                the step, the mean over channels of the logarithm of the ratio of variances.
        """
        for group in self._groups:
            group.digest()
            group.recorder.before()
        self._without_dropout = without_dropout

    def snapshot(self) -> Snapshot | None:
        """All layers since the last snapshot, now; None where there was no step since."""
        if not self._seen:
            return None
        seen, self._seen = self._seen, []
        self._sampler.forget_outdated()
        recorded, sampled = self._fetch()
        layers = {name: LayerMeasures(source) for name, source in self._sources.items()}
        kl = torch.full((len(seen), len(self.layers)), torch.nan, dtype=torch.float64)
        position = {name: index for index, name in enumerate(self.layers)}
        nonfinite = nonfinite_since(self._sampler.samples, seen[0].position)
        batches = [one.samples for one in seen if one.samples]
        for group, (rows, state) in zip(self._groups, recorded, strict=True):
            count = len(rows.calls)  # the last of the steps seen: a group may have begun later
            kl[len(seen) - count :, [position[name] for name in group.names]] = rows.kl
            once = (rows.calls <= 1).all(0).tolist()
            for (name, measures), called_once in zip(from_steps(group.names, rows, state).items(), once, strict=True):
                layer = self.layers[name]
                # Of several calls a step the noise is that of their average: it tells of no batch.
                counted = batches if called_once else []
                layers[name] = with_batch_size(layer, _known(layer, measures), counted, self.noise_level)
            for name, flags in zip(group.names, rows.nonfinite.unbind(1), strict=True):
                if bool((flags > 0).any()):
                    nonfinite[name] = seen[len(seen) - count + int((flags > 0).int().argmax())].position
        layers |= {name: from_samples(row) for name, row in zip(self._sampler.samples, sampled, strict=True)}
        alarms = self._watch.look(layers, kl, nonfinite, self._sampler.samples, seen)
        self.refresh()
        return Snapshot(seen[-1].step, layers, alarms)

    def close(self) -> None:
        """Leave no hook behind; to be called when training ends, however it ends."""
        self._after_broadcast.close()
        self._sampler.close()

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt of the layers' spreads and averages, and the alarms; tensors, numbers and strings."""
        carried, pending = self._learnt()
        return {
            "count": self._count,
            "layers": list(self.layers),
            "carried": carried,
            "pending": pending,
            "samples": self._sampler.state(),
            "seen": [tuple(one) for one in self._seen],
            "watch": self._watch.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; of a model with other layers only the alarms are kept."""
        same = state["layers"] == list(self.layers)
        self._watch.restore(state["watch"], same_layers=same)
        self._handed_out = len(self.alarms)  # before, by the monitor that they come from
        if not same:
            return
        self._count = state["count"]
        self._sampler.restore(state["samples"])
        self._seen = [SeenStep(*one) for one in state["seen"]]
        for group in self._groups:
            group.carry(state["carried"], state["pending"])

    # ------------------------------------------------------------------ how

    def _look_before(self) -> None:
        for group in self._groups:
            group.recorder.before()

    def _source(self, layer: _BatchNorm) -> str:
        reason = why_not_recorded(layer)
        if reason is None:
            return "layer"
        if isinstance(layer, Variant) and layer.by_sample:
            return f"unknown: {reason}"
        if layer.running_mean is None or layer.running_var is None:
            return f"unknown: {reason}, so that there is nothing to compare with"
        if self.input_every_n_steps is None:
            return f"unknown: {reason}, and inputs are not reduced in compiled code"
        return "input"

    def _learnt(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer what is carried on, and the measures of the steps since the last snapshot."""
        carried: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}
        for group in self._groups:
            group.digest()
            carried |= group.carried()
            pending |= group.pending()
        return carried, pending

    def _fetch(self) -> tuple[list[tuple[StepRows, LayerState]], Tensor]:
        """What the groups and the sampler have measured, on the CPU; with ``across_ranks`` the average of all ranks."""
        parts: list[Tensor] = []
        for group in self._groups:
            group.digest()
            parts += group.result()
        rows = [measure_samples(self.layers[name], samples) for name, samples in self._sampler.samples.items()]
        parts.append(torch.stack([row.to(rows[0].device) for row in rows]) if rows else torch.empty(0, 0))
        # One transfer for each device, which is mostly one, and one collective.
        devices: dict[torch.device, list[int]] = {}
        for index, part in enumerate(parts):
            devices.setdefault(part.device, []).append(index)
        flat: list[Tensor] = [torch.empty(0)] * len(parts)
        for indices in devices.values():
            together = torch.cat([parts[i].flatten() for i in indices]).cpu().to(torch.float64)
            for i, part in zip(indices, torch.split(together, [parts[i].numel() for i in indices]), strict=True):
                flat[i] = part
        if self.across_ranks:
            gathered = torch.stack(ranks.all_gather(torch.cat(flat), self.process_group))
            flat = list(torch.split(gathered.nanmean(0), [part.numel() for part in parts]))
        *measured, sampled = (values.view_as(part) for values, part in zip(flat, parts, strict=True))
        pairs = zip(measured[::2], measured[1::2], strict=True)
        return [(StepRows(*rows), LayerState(*state)) for rows, state in pairs], sampled

    def _compare_dropout(self, step: int) -> None:
        """Compare the step just taken with its batch without dropout."""
        without, self._without_dropout = self._without_dropout or {}, None
        recorded = [(group, steps) for group in self._groups if (steps := group.digest()) is not None]
        self.dropout_shift = compare_variances(self.model, recorded, self.layers, without)
        self._watch.dropout(
            self.dropout_shift, lambda name: dropout_before(self.model, self.layers[name]), step, self._count
        )


def _known(layer: _BatchNorm, measures: LayerMeasures) -> LayerMeasures:
    """The measures less those that the layer's running statistics do not tell, by what it keeps in their place."""
    if isinstance(layer, Variant) and type(layer).remembers is not Variant.remembers:
        return measures._replace(mean_shift=math.nan, drift=math.nan, noise=math.nan)  # it keeps no mean
    return measures


def check_arguments(
    every_n_steps: int,
    input_every_n_steps: int | None,
    false_alarms_per_1000_steps: float,
    window: int,
    noise_level: float,
) -> None:
    """Raise a ValueError for an argument of [`bnkit.Monitor`][] that is out of its range."""
    if not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ValueError(f"every_n_steps must be a whole number of at least 1, but is {every_n_steps!r}.")
    if input_every_n_steps is not None and not (isinstance(input_every_n_steps, int) and input_every_n_steps >= 1):
        raise ValueError(
            f"input_every_n_steps must be a whole number of at least 1, or None, but is {input_every_n_steps!r}."
        )
    if not 0 < false_alarms_per_1000_steps < 1000:
        raise ValueError(
            f"false_alarms_per_1000_steps must lie between 0 and 1000, but is {false_alarms_per_1000_steps!r}."
        )
    if not isinstance(window, int) or window < 30:
        raise ValueError(
            f"window must be a whole number of at least 30 steps, but is {window!r}: less tells no spread."
        )
    if not 0 < noise_level < math.inf:
        raise ValueError(f"noise_level must be positive, but is {noise_level!r}.")
