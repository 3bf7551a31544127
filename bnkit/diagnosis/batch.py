"""BN1xx: is the batch one that can be normalised by?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.rule import Found, rule
from bnkit.norms import Ghost, Sync, spec_of

FEW = 8
"""Samples normalised together from which on results fall off (Wu & He 2018, figure 1 and table 2)."""
ACCUMULATED = 32
"""With this many samples normalised together and more, accumulation is not for the normalization's sake."""
LARGE = 1024
"""Above this, Hoffer et al. 2017 and Wu & Johnson 2021 found that models generalise worse."""


@rule(
    "BN101",
    "warning",
    "few samples are normalised together",
    needs="batch_size",
    cause="The batch's mean and variance scatter, training adds that noise to every activation, and inference, which "
    "has none, sees another network.",
    cure="Use a larger batch, or swap to a normalization that depends less on it: bnkit.swap(model, "
    "bnkit.norms.Renorm()), Group(32), or Frozen() for a pretrained model; what batch size would do, bnkit.Monitor "
    "measures.",
)
def small_batch(case: Case) -> Iterator[Found]:
    """Fewer than 8 samples together."""
    refused = set(_with_one_value(case, case.batch_size))  # told as an error
    small = [name for name in _small(case) if not _apart(case, name) and name not in refused]
    by_size: dict[tuple[int, bool], list[str]] = {}
    for name in small:
        is_ghost = isinstance(spec_of(case.layers[name]), Ghost)
        by_size.setdefault((case.samples_together(name) or 0, is_ghost), []).append(name)
    for (samples, is_ghost), names in by_size.items():
        cure = "Give Ghost a larger size, 16 or more, or leave it out." if is_ghost else ""
        yield Found(names, f"{_samples(samples)} normalised together: {_noise(case, names, samples)}.", cure)


@rule(
    "BN102",
    "error",
    "one value per channel",
    needs="batch_size",
    cause="One value has no variance, so training raises 'Expected more than 1 value per channel'.",
    cure="Use a batch of at least two samples, drop_last=True in the training loader, or a normalization without a "
    "batch: bnkit.swap(model, bnkit.norms.Group(32)), or Frozen() for a pretrained model.",
)
def one_value(case: Case) -> Iterator[Found]:
    """A batch of one where a layer gets one value from each sample."""
    smallest = case.batch_size if case.smallest_batch is None else case.smallest_batch
    if smallest is None and case.run is not None and case.run.single_value is not None:
        smallest = case.run.samples
    if smallest is None:
        return
    names = list(_with_one_value(case, smallest))
    if not names:
        return
    if case.batch_size is not None and smallest < case.batch_size:
        yield Found(
            names,
            f"The last batch of an epoch has {smallest} sample (the others {case.batch_size}), and leaves the layer "
            "one value per channel: training will stop there with 'Expected more than 1 value per channel'.",
            "Give the training loader drop_last=True, or another batch_size.",
        )
    else:
        yield Found(
            names,
            "A batch of one sample leaves the layer one value per channel, which has no variance: training will stop "
            "with 'Expected more than 1 value per channel'.",
        )


@rule(
    "BN103",
    "info",
    "accumulated gradients do not enlarge the normalization batch",
    needs="batch_size",
    cause="Each of the accumulated batches is normalised by itself; only the optimizer sees the larger one.",
    cure="Nothing, if it is meant; else a larger batch on the device, bnkit.norms.Sync() over several, or "
    "bnkit.norms.Renorm().",
)
def accumulation(case: Case) -> Iterator[Found]:
    """Accumulation over batches that are not large themselves."""
    if case.batch_size is None or case.accumulate <= 1:
        return
    names = [
        name
        for name in case.by_batch_alone()
        if case.parts(name, case.batch_size) == 1 and (case.samples_together(name) or 0) < ACCUMULATED
    ]
    if names:
        samples = min(case.samples_together(name) or 0 for name in names)
        yield Found(
            names,
            f"The optimizer takes a step every {case.accumulate} batches, but the layers normalise each batch by "
            f"itself, {_samples(samples, be=False)} together and not {samples * case.accumulate}.",
        )


@rule(
    "BN104",
    "warning",
    "small batches of several ranks are normalised apart",
    needs="world_size",
    cause="Each rank normalises by its own few samples, though together they have enough.",
    cure="Synchronize: bnkit.swap(model, bnkit.norms.Sync()), in Lightning BatchNormSwap(Sync()), or NormBatch(size) "
    "for a batch in between.",
)
def ranks_apart(case: Case) -> Iterator[Found]:
    """Few samples on a rank, enough on all."""
    names = [name for name in _small(case) if _apart(case, name)]
    if names and case.batch_size is not None:
        together = case.batch_size * case.world_size
        yield Found(
            names,
            f"Each of the {case.world_size} ranks normalises its {case.batch_size} by itself, though together they "
            f"have {together} samples: {_noise(case, names, case.batch_size)}, which synchronized would be "
            f"{math.sqrt(case.world_size):.2g} times less.",
        )


@rule(
    "BN105",
    "info",
    "a very large normalization batch",
    needs="batch_size",
    cause="The noise of smaller batches regularises; without it models were found to generalise worse (Hoffer et al. "
    "2017; Wu & Johnson 2021).",
    cure="Nothing, if it validates well; else try bnkit.swap(model, bnkit.norms.Ghost(128)), or NormBatch(128) over "
    "ranks.",
)
def large_batch(case: Case) -> Iterator[Found]:
    """More than 1,024 samples together."""
    names = [name for name in case.by_batch_alone() if (case.samples_together(name) or 0) > LARGE]
    if names:
        samples = max(case.samples_together(name) or 0 for name in names)
        yield Found(names, f"{samples:,} samples are normalised together, so that normalization adds no noise.")


@rule(
    "BN106",
    "info",
    "a Ghost that does nothing",
    needs="batch_size",
    cause="A batch of fewer than two ghosts is normalised whole, as plain BatchNorm does.",
    cure="Give Ghost at most half the device's batch as its size, or leave it out.",
)
def idle_ghost(case: Case) -> Iterator[Found]:
    """Ghosts as large as the batch."""
    by_size: dict[int, list[str]] = {}
    for name, layer in case.layers.items():
        spec = spec_of(layer)
        if case.batch_size is not None and isinstance(spec, Ghost) and case.parts(name, case.batch_size) == 1:
            by_size.setdefault(spec.size, []).append(name)
    for size, names in by_size.items():
        yield Found(names, f"Ghost({size}) has one ghost in a batch of {case.batch_size}, and so is plain BatchNorm.")


@rule(
    "BN107",
    "error",
    "ranks that cannot be cut into Sync's groups",
    needs="world_size",
    cause="Sync's group_size has to divide the number of ranks; the first training forward fails otherwise.",
    cure="Choose a group_size that divides the number of ranks, or None for all of them.",
)
def uneven_groups(case: Case) -> Iterator[Found]:
    """A group_size that does not divide the ranks."""
    by_size: dict[int, list[str]] = {}
    for name, layer in case.layers.items():
        spec = spec_of(layer)
        if isinstance(spec, Sync) and spec.group_size and case.world_size > 1 and case.world_size % spec.group_size:
            by_size.setdefault(spec.group_size, []).append(name)
    for size, names in by_size.items():
        yield Found(names, f"{case.world_size} ranks cannot be cut into the groups of {size} that Sync({size}) wants.")


def _with_one_value(case: Case, batch: int | None) -> Iterator[str]:
    """The layers that a batch of so many samples leaves a single value per channel, as far as is known."""
    if batch is None:
        return
    for name in case.by_batch():
        values = _values_per_sample(case, name)
        if values is not None and case.keeps_mean(name) and batch * case.ranks_together(name) * values <= 1:
            yield name


def _small(case: Case) -> Iterator[str]:
    for name in case.by_batch_alone():
        samples = case.samples_together(name)
        if samples is not None and samples < FEW:
            yield name


def _apart(case: Case, name: str) -> bool:
    """Whether synchronizing the layer over all ranks would be enough."""
    whole = case.batch_size is not None and case.parts(name, case.batch_size) == 1
    return whole and not case.is_synchronized(name) and (case.batch_size or 0) * case.world_size >= FEW


def _measured_noise(case: Case, name: str, samples: int) -> float | None:
    return None if case.run is None else case.run.noise(name, max(samples, 1), case.layers[name].eps)


def _noise(case: Case, names: list[str], samples: int) -> str:
    """The scatter of the mean, as a sample tells it, or else its upper bound."""
    measured = {name: noise for name in names if (noise := _measured_noise(case, name, samples)) is not None}
    if measured:
        worst = max(measured, key=lambda name: measured[name])
        values = round(samples * (_values_per_sample(case, worst) or 1))
        independent = f"1/sqrt({values:,}) = {1 / math.sqrt(values):.2g} if its values were independent"
        return (
            f"a channel's mean scatters from batch to batch by {measured[worst]:.2g} of its standard deviation in "
            f"{worst!r}, as the sample tells ({independent})"
        )
    return (
        f"a channel's mean scatters from batch to batch by up to 1/sqrt({samples}) = {1 / math.sqrt(samples):.2g} of "
        "its standard deviation (so much where a sample has one value; less the more its positions vary)"
    )


def _values_per_sample(case: Case, name: str) -> float | None:
    """Values that a channel of the layer gets from one sample; None where it is not known."""
    if case.run is not None:
        known = case.run.values_per_sample(name)
        if known is not None:
            return known
    before = case.before.get(name)
    after_linear = before is not None and before.modules and all(isinstance(m, nn.Linear) for m in before.modules)
    return 1.0 if after_linear and isinstance(case.layers[name], nn.BatchNorm1d) else None


def _samples(number: int, *, be: bool = True) -> str:
    verb = (" is" if number == 1 else " are") if be else ""
    return f"{number:,} sample{'' if number == 1 else 's'}{verb}"
