"""diagnose(): what is wrong with a model's BatchNorm, with cause and cure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from bnkit.diagnosis.case import Case
from bnkit.diagnosis.finding import SEVERITIES, Finding
from bnkit.diagnosis.rule import CODES
from bnkit.diagnosis.sample import run_sample
from bnkit.feeding import Forward
from bnkit.layers import batch_norm_layers, unwrap

__all__ = ["check_codes", "diagnose"]


def diagnose(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    batch_size: int | None = None,
    world_size: int = 1,
    accumulate: int = 1,
    sample: Any = None,
    forward: Forward | None = None,
    smallest_batch: int | None = None,
    recalibrates: bool = False,
    averages: Iterable[AveragedModel] = (),
    ignore: Iterable[str] = (),
) -> list[Finding]:
    """Find out what is wrong with a model's BatchNorm layers, or will be when it is trained.

    Each rule looks at what it is given, and says nothing where it does not know: [`bnkit.diagnosis.CODES`][] lists
    them, with what each needs. A model with nothing wrong gives an empty list, and so does one without BatchNorm
    layers. Variants ([`bnkit.norms`][]) are judged by what they do, and frozen layers by theirs: a layer in evaluation
    mode within a model in training mode.

    A sample goes through the model three times, without gradient, and nothing is changed: parameters, buffers, modes,
    hooks and random states are bit-identical afterwards, also after an exception. Layers that are synchronized over
    ranks wait for the other ranks, which must call this too.

    Args:
        model: any module with layers of the ``torch.nn.BatchNorm*`` family; DistributedDataParallel and torch.compile
            wrappers are looked through. Whether its modules are in training or evaluation mode counts.
        optimizer: the optimizer, or several.
        batch_size: samples in one device's training batch; None: not known.
        world_size: number of ranks that train together.
        accumulate: batches from one optimizer step to the next.
        sample: a training batch, as the loader gives it, on any device; None: measure nothing.
        forward: how to run the model on it; default: a tensor, the first item of a tuple or list, or a dict as keyword
            arguments.
        smallest_batch: samples in the smallest training batch, such as the last of an epoch; None: ``batch_size``.
        recalibrates: whether the statistics will be measured before the model is used, as by BatchNormRecalibration.
        averages: averages of the model's weights that will be evaluated and saved in its place. (A model that is one
            itself need not be named.)
        ignore: codes of rules to leave out.

    Returns:
        The findings, the worst first and then by code.

    Raises:
        ValueError: for a number that is not positive, a code that there is none of, a sample that leaves a layer a
            single value though ``batch_size`` is larger, and a model with a lazy layer that has seen no forward yet.
        TypeError: for a scripted model, something else than optimizers, and a sample that the default forward cannot
            feed.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8, momentum=0.9))
        >>> [finding.code for finding in bnkit.diagnose(model, batch_size=32)]
        ['BN211']
        >>> model[1].momentum = 0.1
        >>> bnkit.diagnose(model, batch_size=32)
        []
    """
    for name, value in (
        ("batch_size", batch_size),
        ("smallest_batch", smallest_batch),
        ("world_size", world_size),
        ("accumulate", accumulate),
    ):
        may_be_none = name in ("batch_size", "smallest_batch")
        if not (may_be_none and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}.")
    left_out = check_codes(ignore)
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer is a torch.optim.Optimizer or several, not {one!r}.")
    model = unwrap(model)
    layers = batch_norm_layers(model)
    if not layers:
        return []
    run = None
    if sample is not None:
        smallest = batch_size if smallest_batch is None else smallest_batch
        run = run_sample(model, layers, sample, forward, small=smallest is None or smallest == 1)
    case = Case(
        model,
        layers,
        optimizers=optimizers,
        batch_size=batch_size,
        smallest_batch=smallest_batch,
        world_size=world_size,
        accumulate=accumulate,
        recalibrates=recalibrates,
        averages=tuple(averages),
        run=run,
    )
    rules = [rule for code, rule in sorted(CODES.items()) if code not in left_out]
    found = [finding for rule in rules for finding in rule.findings(case)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))


def check_codes(codes: Iterable[str]) -> set[str]:
    """The codes as a set.

    Raises:
        ValueError: for one that there is none of.
    """
    codes = [codes] if isinstance(codes, str) else list(codes)
    for code in codes:
        if code not in CODES:
            raise ValueError(f"ignore: there is no rule {code!r}; there are {', '.join(sorted(CODES))}.")
    return set(codes)
