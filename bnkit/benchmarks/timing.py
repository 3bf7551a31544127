"""Timing several candidates side by side: interleaved, in random order, as ratios within each round."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["CLOCKS", "Candidate", "Ratio", "Timings", "interleave", "of_each_round", "slope", "synchronize"]

Clock = Literal["cpu", "wall"]

CLOCKS: tuple[Clock, ...] = ("cpu", "wall")


@dataclass(frozen=True)
class Ratio:
    """A candidate's time over the baseline's in the same round: the median of the rounds and their spread."""

    median: float
    low: float  # 5th percentile
    high: float  # 95th percentile

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"

    @classmethod
    def of(cls, values: Iterable[float]) -> Ratio:
        """Median, 5th and 95th percentile of one value a round."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), _percentile(ordered, 0.05), _percentile(ordered, 0.95))


@dataclass(frozen=True)
class Candidate:
    """What is timed, and what has to be done each time before it, which is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate in each round, by CPU time of the process and by the clock on the wall."""

    baseline: str
    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]

    def ratio(self, candidate: str, clock: Clock = "cpu", over: str | None = None) -> Ratio:
        """Over the baseline, or another candidate, round by round: what slows the machine for a while slows both."""
        seconds = self.cpu if clock == "cpu" else self.wall
        return Ratio.of(of_each_round(seconds[candidate], seconds[over or self.baseline]))

    def to_dict(self) -> dict[str, Any]:
        """Ratios and the number of rounds, ready for JSON; seconds are this machine's, and left out."""
        return {
            "baseline": self.baseline,
            "rounds": len(self.cpu[self.baseline]),
            "ratios": {
                name: {clock: vars(self.ratio(name, clock)) for clock in CLOCKS}
                for name in self.cpu
                if name != self.baseline
            },
        }


def interleave(
    candidates: Mapping[str, Callable[[], object] | Candidate],
    *,
    baseline: str,
    rounds: int,
    seed: int = 0,
    warmup: int = 1,
    device: str | torch.device = "cpu",
) -> Timings:
    """Run every candidate once a round, in an order drawn anew for each.

    Args:
        candidates: by name; each does the same amount of work.
        baseline: the name of the one that the others are compared with.
        rounds: how many, at least 1.
        seed: of the order.
        warmup: rounds before, which do not count.
        device: waited for before each clock is read.

    Raises:
        ValueError: an argument out of its range.
    """
    if baseline not in candidates:
        raise ValueError(f"The baseline {baseline!r} is not among the candidates {list(candidates)}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, but is {rounds!r}.")
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed).shuffle
    gc.freeze()  # what was there before need not be gone through again and again
    try:
        for counted in range(-warmup, rounds):
            shuffle(order)
            for name in order:
                given = candidates[name]
                candidate = given if isinstance(given, Candidate) else Candidate(given)
                candidate.prepare()
                gc.collect()  # or one pays for what another has left
                synchronize(device)
                cpu_began, wall_began = time.process_time(), time.perf_counter()
                candidate.run()
                synchronize(device)
                cpu_seconds, wall_seconds = time.process_time() - cpu_began, time.perf_counter() - wall_began
                if counted >= 0:
                    cpu[name].append(cpu_seconds)
                    wall[name].append(wall_seconds)
    finally:
        gc.unfreeze()
    return Timings(baseline, cpu, wall)


def synchronize(device: str | torch.device) -> None:
    """Wait until a CUDA device has done what it was told; nothing on others."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def of_each_round(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """The ratio in each round."""
    return [mine / other for mine, other in zip(own, base, strict=True)]


def slope(sizes: Sequence[float], values: Sequence[Sequence[float]]) -> Ratio:
    """The exponent e of ``value ~ size**e``, fitted by least squares of the logarithms in each round.

    Args:
        sizes: at least two different ones, positive.
        values: for each size one positive value a round.

    Returns:
        Median and spread of the rounds' exponents: 1 is linear, and of a ratio of costs 0 is "as fast as the work".
    """
    x = [math.log(size) for size in sizes]
    center = statistics.fmean(x)
    spread = sum((one - center) ** 2 for one in x)
    rounds = zip(*values, strict=True)
    return Ratio.of(
        sum((a - center) * math.log(b) for a, b in zip(x, of_round, strict=True)) / spread for of_round in rounds
    )


def _percentile(values: list[float], fraction: float) -> float:
    """Of sorted values, by linear interpolation."""
    position = fraction * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (position - below) * (values[above] - values[below])
