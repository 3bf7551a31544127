"""How long swapping all layers of a model takes, from few layers to many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

import bnkit
from bnkit.benchmarks.memory import peaks
from bnkit.benchmarks.models import chain
from bnkit.benchmarks.result import Curve, Goal, Result, Row, clock_of, rows
from bnkit.benchmarks.timing import Candidate, Ratio, Timings, interleave, slope
from bnkit.norms import Ghost

__all__ = ["FORWARD", "LINEAR", "measure"]

FORWARD = "one forward in training mode"

LINEAR = 1.1
"""The exponent up to which a growth is called linear."""


def measure(
    *,
    layers: Sequence[int],
    channels: int,
    batch_size: int,
    pixels: int,
    rounds: int,
    device: str,
    seed: int,
) -> Result:
    """Swap all layers of chains of convolution, BatchNorm and ReLU, and give them back.

    Args:
        layers: BatchNorm layers of each model.
        channels: of all layers.
        batch_size: samples of the forward that it is compared with.
        pixels: height and width of its images.
        rounds: measurements of each.
        device: to compute on.
        seed: of weights and order.
    """
    torch.manual_seed(seed)
    table: list[Row] = []
    timed: dict[int, Timings] = {}
    for count in layers:
        model, swapped, back = (chain(count, channels).to(device) for _ in range(3))
        x = torch.randn(batch_size, channels, pixels, pixels, device=device)

        def forward(model: torch.nn.Module = model, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        calls: dict[str, Callable[[], object] | Candidate] = {
            FORWARD: forward,
            "bnkit.swap": Candidate(partial(bnkit.swap, swapped, Ghost(8)), partial(bnkit.revert, swapped)),
            "bnkit.revert": Candidate(partial(bnkit.revert, back), partial(bnkit.swap, back, Ghost(8))),
        }
        timed[count] = interleave(calls, baseline=FORWARD, rounds=rounds, seed=seed, device=device)
        limit = Goal(clock_of(device), 1)
        goals = {name: limit for name in ("bnkit.swap", "bnkit.revert") if count == max(layers)}
        table += rows(f"{count} layers", timed[count], peaks(calls, device), goals=goals)
    curves = []
    for name in ("bnkit.swap", "bnkit.revert"):
        fitted = slope(list(timed), [timings.cpu[name] for timings in timed.values()])
        what = f"{min(layers)} to {max(layers)} layers"
        table.append(Row(what, f"{name}: exponent of its time", "layers", {"value": fitted}, Goal("value", LINEAR)))
        ratios: list[Ratio] = [timings.ratio(name) for timings in timed.values()]
        curves.append(Curve(f"{name} over one forward", "layers", list(timed), ratios))
    return Result(
        "swap",
        device,
        f"Swapping all layers of a model to ghost batches, and back, over one forward of {batch_size} samples of "
        f"{channels} x {pixels} x {pixels}.",
        rounds,
        table,
        [f"Exponent: of the fit time ~ layers^exponent; up to {LINEAR} is called linear."],
        curves=curves,
    )
