"""recalibrate(): running statistics that are those of the data, not of a moving average."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit import ranks
from bnkit.collection import Collected, Collector, kinds
from bnkit.feeding import Forward
from bnkit.layers import batch_norm_layers, unwrap
from bnkit.norms import Variant
from bnkit.observation import eager
from bnkit.preservation import preserved, random_states_preserved
from bnkit.report import LayerReport, RecalibrationReport
from bnkit.running import read_statistics, write_statistics
from bnkit.stand_ins import stand_ins
from bnkit.targets import choose_targets, trains_by_statistics

__all__ = ["check_arguments", "recalibrate"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = 10_000,
    tolerance: float | None = None,
    prior_samples: float = 0,
    consistency: Literal["batch", "population"] = "batch",
    on_nonfinite: Literal["raise", "skip"] = "raise",
    frozen: Collection[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> RecalibrationReport:
    r"""Set the running statistics of the model's BatchNorm layers to those of the data.

    Training leaves a moving average of the statistics of weights long gone, each of one small batch. This goes over
    data with the weights as they are and pools what every layer normalises by the law of total variance
    ([`bnkit.Moments`][]). With ``consistency="batch"`` it is PreciseBN (Wu & Johnson 2021, "Rethinking 'Batch' in
    BatchNorm", section 3), with the variance between batches kept, which averaging batch variances drops. The running
    variance becomes the population's (biased) variance.

    While the data goes through, only the layers that are recalibrated are in training mode, so dropout and drop-path
    are off. All is computed aside and written at the end, in place: an exception, Ctrl-C, an empty loader or a batch
    that is not finite leaves every buffer, mode, momentum, hook and random state as it was. After success too, nothing
    but the running means and variances has changed, ``num_batches_tracked`` included. Compiled models run eagerly
    meanwhile, and are not recompiled afterwards.

    Under torch.distributed every rank must call it, each with its own share of the data; shares may be uneven or empty.
    All ranks stop at the same batch and get the same bits. If one rank fails, all of them raise and none has changed.

    Left as they are, and named in the report's ``kept``: layers that no forward reaches, layers without running
    statistics, frozen layers (see ``frozen``), and layers of a class whose own forward turns out to normalise something
    else than its input.

    Args:
        model: any module with layers of the ``torch.nn.BatchNorm*`` family; wrappers (DistributedDataParallel,
            torch.compile, Lightning Fabric's) are looked through, so under mixed precision this is to be called inside
            ``torch.autocast`` or ``fabric.autocast()``.
        batches: an iterable of batches, such as a DataLoader of the training data.
        forward: how to run the model on a batch. Default: a tensor, the first item of a tuple or list, or a dict as
            keyword arguments, moved to the model's device.
        max_samples: at most this many samples over all ranks, in whole batches (but one batch at least). None: all. To
            know when to stop, one batch more is taken from ``batches``.
        tolerance: stop as soon as, in every channel, the standard error of the mean is at most this times the standard
            deviation: 0.01 means 1 %. The spread of the batch means tells the standard error, so at least four batches
            are used, and they should come in random order. ``report.samples`` says how many samples it took.
        prior_samples: how many samples the statistics already in the model are worth: with N of these and n seen, the
            result is $\frac{N}{N+n} s_{old} + \frac{n}{N+n} s_{seen}$ for mean and variance alike (Schneider et
            al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", equation 2).
            Where the data are shifted, take ``consistency="population"`` with it: in a single pass no layer meets the
            mixed statistics of those before it.
        consistency: what the layers upstream normalise by while a layer is calibrated. ``"batch"``: by their batches,
            as in training; one pass over the data. ``"population"``: by their final statistics, as at inference; one
            pass a layer, in the order in which the forward reaches them, each running the model only up to that layer
            (about half of a forward on average), so ``batches`` must be iterable again and again. The two differ where
            batches are small. The first batch tells the order: a layer that only a later one reaches is kept. A layer
            that is used several times has itself upstream, and normalises by its batches meanwhile. A model with layers
            that normalise by their running statistics in training too (``Renorm``, ``MovingAverage``) is always
            calibrated so.
        on_nonfinite: what to do with a batch in which a statistic is not finite: ``"raise"``, naming layer and batch,
            or ``"skip"`` the batch for all layers and count it in the report.
        frozen: names of the layers to leave as they are. Default: those in evaluation mode while the model is in
            training mode.
        process_group: the ranks that share the work. Default: all.
        progress: show a progress bar (on rank 0).

    Returns:
        What was found; see [`bnkit.RecalibrationReport`][].

    Raises:
        ValueError: an argument out of its range, no BatchNorm layers, no data, a batch that leaves a layer one value
            per channel, or a forward that reaches none of the layers.
        TypeError: a batch that the default forward cannot feed, or a scripted model.
        FloatingPointError: a statistic that is not finite, with ``on_nonfinite="raise"``.
        RuntimeError: another rank failed, and how; that rank raises its own error.
    """
    started = time.perf_counter()
    model = unwrap(model)

    def facts() -> dict[str, object]:
        check_arguments(max_samples, tolerance, prior_samples, consistency, on_nonfinite)
        arguments = {
            "max_samples": max_samples,
            "tolerance": tolerance,
            "prior_samples": prior_samples,
            "consistency": consistency,
            "on_nonfinite": on_nonfinite,
        }
        return arguments | kinds(model)

    key = ranks.agree("Recalibration", facts, process_group)
    targets, kept = choose_targets(model, frozen, process_group)
    # A tensor made in inference mode could not be trained with later, so none is made, unless the model's are such.
    inference = torch.inference_mode(any(buffer.is_inference() for buffer in model.buffers()))
    with ranks.leaving_word("Recalibration", key, process_group), inference, torch.no_grad():
        before = {name: pair for name, pair in read_statistics(model).items() if name in targets}
        # DDP keeps the ranks' buffers apart until its next forward, which sends rank 0's to all.
        prior = _of_first_rank(before, process_group) if prior_samples and before else before
        _check_prior(prior, prior_samples)
        if not targets:
            return RecalibrationReport(0, 0, 0, 0, time.perf_counter() - started, {}, kept, {})
        collector = Collector(
            model, batches, forward, max_samples, tolerance, on_nonfinite == "skip", process_group, progress
        )
        with eager(), random_states_preserved(model, batches), preserved(model), stand_ins(targets):
            # Statistics that training normalises by too are those of no batch: only layer by layer do they fit.
            one_pass = consistency == "batch" and not any(trains_by_statistics(layer) for layer in targets.values())
            if one_pass:
                collected, passes = collector.collect(targets), 1
                after = _mix(collector, prior, collected, prior_samples)
            else:
                collected, after, passes = _layer_by_layer(collector, targets, prior, prior_samples)
        kept |= dict.fromkeys(collected.unknown, "its class has a forward of its own, of something else than its input")
        kept |= {name: "not reached by the forward" for name in targets if name not in after and name not in kept}
        if not after:
            raise ValueError(
                f"The forward reached none of the BatchNorm layers {list(targets)} whose input they normalise: "
                "pass forward= one that does."
            )
        report = RecalibrationReport(
            collected.samples,
            collected.batches,
            collected.skipped,
            passes,
            time.perf_counter() - started,
            {name: _layer_report(name, targets[name], before[name], pair, collected) for name, pair in after.items()},
            kept,
            {name: before[name] for name in after},
        )
        # Last, and in one go: until here nothing has changed.
        write_statistics(model, after)
        return report


def _of_first_rank(
    statistics: Mapping[str, tuple[Tensor, Tensor]], process_group: dist.ProcessGroup | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The group's first rank's statistics, in float64 on the CPU."""
    mine = torch.cat([buffer.double().cpu() for pair in statistics.values() for buffer in pair])
    sizes = [len(buffer) for pair in statistics.values() for buffer in pair]
    parts = torch.split(ranks.broadcast(mine, process_group), sizes)
    return dict(zip(statistics, zip(parts[::2], parts[1::2], strict=True), strict=True))


def _layer_by_layer(
    collector: Collector,
    targets: Mapping[str, _BatchNorm],
    before: Mapping[str, tuple[Tensor, Tensor]],
    prior_samples: float,
) -> tuple[Collected, dict[str, tuple[Tensor, Tensor]], int]:
    """consistency="population": each layer with everything upstream at its final statistics."""
    if isinstance(collector.batches, Iterator):
        raise ValueError(
            'consistency="population", or a variant that trains by its running statistics, takes a pass over the data '
            "for each layer, but an iterator can be used only once: "
            "pass a list or a DataLoader."
        )
    order = collector.order(targets)
    total: Collected | None = None
    after: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (name, calls) in enumerate(order.items(), start=1):
        # The same random states for each pass: the same order of the data, so the same samples.
        with random_states_preserved(collector.model, collector.batches):
            one = collector.collect({name: targets[name]}, calls, f"layer {number}/{len(order)}")
        after |= _mix(collector, before, one, prior_samples)
        write_statistics(collector.model, {name: after.get(name, before[name])})
        total = one if total is None else total.with_layers_of(one)
    return total or Collected({}, {}, set(), 0, 0, 0), after, len(order)


def _mix(
    collector: Collector,
    before: Mapping[str, tuple[Tensor, Tensor]],
    collected: Collected,
    prior_samples: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The statistics to write, in float64 on the CPU, of the layers that were reached."""
    layers = batch_norm_layers(collector.model)
    weight = prior_samples / (prior_samples + collected.samples) if prior_samples else 0.0
    mixed = {}
    for name, seen in collected.layers.items():
        layer = layers[name]
        pair = layer.remembers(seen.mean, seen.var) if isinstance(layer, Variant) else (seen.mean, seen.var)
        if weight:
            old_pair = (old.double().cpu() for old in before[name])
            pair = tuple(torch.lerp(new, old, weight) for new, old in zip(pair, old_pair, strict=True))  # type: ignore[assignment]
        mixed[name] = pair
    return mixed


def _layer_report(
    name: str, layer: _BatchNorm, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], collected: Collected
) -> LayerReport:
    old_mean, old_var = (old.double().cpu() for old in before)
    return LayerReport(
        mean_shift=(after[0] - old_mean) / (old_var + layer.eps).sqrt(),
        var_ratio=(after[1] + layer.eps) / (old_var + layer.eps),
        standard_error=collected.layers[name].standard_error,
        source=collected.sources.get(name, "layer"),
    )


def check_arguments(max_samples: Any, tolerance: Any, prior_samples: Any, consistency: str, on_nonfinite: str) -> None:
    """Raise a ValueError for an argument of [`bnkit.recalibrate`][] that is out of its range."""
    if max_samples is not None and not (_is_number(max_samples) and max_samples >= 1):
        raise ValueError(f"max_samples must be at least 1, or None for all, but is {max_samples!r}.")
    if tolerance is not None and not (_is_number(tolerance) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance must be a positive fraction of the standard deviation, but is {tolerance!r}.")
    if not (_is_number(prior_samples) and 0 <= prior_samples < math.inf):
        raise ValueError(f"prior_samples must be a number of samples, 0 or more, but is {prior_samples!r}.")
    if consistency not in ("batch", "population"):
        raise ValueError(f'consistency must be "batch" or "population", but is {consistency!r}.')
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f'on_nonfinite must be "raise" or "skip", but is {on_nonfinite!r}.')


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def _check_prior(before: Mapping[str, tuple[Tensor, Tensor]], prior_samples: float) -> None:
    for name, pair in before.items() if prior_samples else ():
        if not all(bool(old.isfinite().all()) for old in pair):
            raise ValueError(
                f"prior_samples={prior_samples} weighs the running statistics of layer {name!r}, which are not finite: "
                "use prior_samples=0."
            )
