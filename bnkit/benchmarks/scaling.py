"""Cost against size: does anything of bnkit's grow faster than the work that it is added to?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import bnkit
from bnkit.benchmarks.models import backward_of, chain
from bnkit.benchmarks.result import Curve, Goal, Result, Row, clock_of
from bnkit.benchmarks.timing import Ratio, Timings, interleave, of_each_round, slope
from bnkit.monitoring import Monitor
from bnkit.norms import Ghost

__all__ = ["FLAT", "SUBJECTS", "exponents", "measure"]

FLAT = 0.03
"""The exponent of the ratio up to which cost is called no faster than the work: a tenfold size then costs 7 % more."""

_Calls = tuple[Callable[[], object], Callable[[], object]]


def measure(
    *,
    subjects: Sequence[str],
    base: Mapping[str, int],
    sizes: Mapping[str, Sequence[int]],
    steps: int,
    ghost_size: int,
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Time each subject beside its bare work on chains of convolution, BatchNorm and ReLU of growing size.

    Args:
        subjects: of ``SUBJECTS``.
        base: layers, channels, samples and pixels of the chain where they are not what grows.
        sizes: what grows, of "layers", "channels" and "samples", and through which values.
        steps: forwards of one recalibration, training steps of one monitored measurement, with one snapshot.
        ghost_size: samples a ghost.
        rounds: measurements of each.
        device: to compute on.
        seed: of weights and order.

    Raises:
        ValueError: for a subject that there is not.
    """
    unknown = set(subjects) - set(SUBJECTS)
    if unknown:
        raise ValueError(f"subjects={sorted(unknown)} is unknown; there are {list(SUBJECTS)}.")
    table: list[Row] = []
    curves: list[Curve] = []
    clock = "cpu" if clock_of(device) == "cpu" else "wall"
    for axis, values in sizes.items():
        for subject in subjects:
            ratios = []
            for value in values:
                at = {**base, axis: value}
                torch.manual_seed(seed)
                # Of convolutions of 1 x 1 there is least, and so most of what is added.
                model = chain(at["layers"], at["channels"], 1).to(device).train()
                x = torch.randn(at["samples"], at["channels"], at["pixels"], at["pixels"], device=device)
                bare, own = SUBJECTS[subject](model, x, steps, ghost_size)
                calls = {"bare": bare, subject: own}
                timings: Timings = interleave(calls, baseline="bare", rounds=rounds, seed=seed, device=device)
                seconds = timings.cpu if clock == "cpu" else timings.wall
                ratios.append(of_each_round(seconds[subject], seconds["bare"]))
            table += exponents(subject, axis, list(values), ratios)
            curves.append(Curve(subject, axis, list(values), [Ratio.of(one) for one in ratios]))
    return Result(
        "scaling",
        device,
        f"Cost against size: the {'CPU' if clock == 'cpu' else 'wall'} time of chains of 1 x 1 convolution, BatchNorm "
        "and ReLU with a recalibration, with the monitor, or as ghost batches, over the bare work: forward without "
        f"gradients, training step, forward and backward. Otherwise {_words(base)}.",
        rounds,
        table,
        [
            "Exponent: of the fit ratio ~ size^exponent, over all sizes and over the three largest. 0: cost grows as "
            "the work does. Below: it grows more slowly."
        ],
        curves=curves,
    )


def exponents(subject: str, axis: str, sizes: list[int], ratios: Sequence[Sequence[float]]) -> list[Row]:
    """How the ratio over the bare work grows; a row for all sizes and one for the three largest.

    Args:
        subject: what is added to the work.
        axis: what the sizes are of.
        sizes: at least two.
        ratios: for each size one a round.
    """
    made = []
    for part in (slice(None), slice(-3, None)) if len(sizes) > 3 else (slice(None),):
        fitted = slope(sizes[part], ratios[part])
        what = f"{axis} {min(sizes[part]):,} to {max(sizes[part]):,}"
        flag = "grows faster than the work" if fitted.low > 0 and fitted.median > FLAT else ""
        found = {"value": fitted}
        made.append(Row(what, f"{subject}: exponent", "the bare work", found, Goal("value", FLAT), flag))
    return made


def _recalibration(model: nn.Module, x: Tensor, steps: int, _: int) -> _Calls:
    data, own = [x] * steps, copy.deepcopy(model)

    def bare() -> None:
        with torch.no_grad():
            for batch in data:
                model(batch)

    return bare, lambda: bnkit.recalibrate(own, data, max_samples=None)


def _monitor(model: nn.Module, x: Tensor, steps: int, _: int) -> _Calls:
    watched = copy.deepcopy(model)
    monitor = Monitor(watched, every_n_steps=steps)
    bare, own = _step(model, x), _step(watched, x)

    def plain() -> None:
        for _ in range(steps):
            bare()

    def watching() -> None:
        for step in range(steps):
            monitor.before()
            own()
            monitor.after(step, len(x))

    return plain, watching


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _ghost(model: nn.Module, x: Tensor, _: int, size: int) -> _Calls:
    swapped = copy.deepcopy(model)
    bnkit.swap(swapped, Ghost(size))
    return backward_of(model, x), backward_of(swapped, x)


SUBJECTS: dict[str, Callable[[nn.Module, Tensor, int, int], _Calls]] = {
    "recalibration": _recalibration,
    "monitor": _monitor,
    "ghost": _ghost,
}
"""By name: the bare work, and the same with what is measured."""


def _words(base: Mapping[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in base.items())
