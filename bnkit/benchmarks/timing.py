"""Timing several candidates side by side: interleaved, in random order, as ratios within each round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Ratio", "Timings", "interleave"]

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Ratio:
    """A candidate's time over the baseline's in the same round: the median of the rounds and their spread."""

    median: float
    low: float  # 5th percentile
    high: float  # 95th percentile

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate in each round, by CPU time of the process and by the clock on the wall."""

    baseline: str
    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]

    def ratio(self, candidate: str, clock: Clock = "cpu") -> Ratio:
        """Over the baseline, round by round: what slows the machine for a while slows both."""
        seconds = self.cpu if clock == "cpu" else self.wall
        rounds = zip(seconds[candidate], seconds[self.baseline], strict=True)
        ratios = sorted(own / base for own, base in rounds)
        return Ratio(statistics.median(ratios), _percentile(ratios, 0.05), _percentile(ratios, 0.95))

    def to_dict(self) -> dict[str, Any]:
        """Ratios and the number of rounds, ready for JSON; seconds are this machine's, and left out."""
        return {
            "baseline": self.baseline,
            "rounds": len(self.cpu[self.baseline]),
            "ratios": {
                name: {clock: vars(self.ratio(name, clock)) for clock in ("cpu", "wall")}
                for name in self.cpu
                if name != self.baseline
            },
        }


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int, seed: int = 0, warmup: int = 1
) -> Timings:
    """Run every candidate once a round, in an order drawn anew for each.

    Args:
        candidates: by name; each does the same amount of work.
        baseline: the name of the one that the others are compared with.
        rounds: how many, at least 1.
        seed: of the order.
        warmup: rounds before, which do not count.

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
    for counted in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            cpu_began, wall_began = time.process_time(), time.perf_counter()
            candidates[name]()
            cpu_seconds, wall_seconds = time.process_time() - cpu_began, time.perf_counter() - wall_began
            if counted >= 0:
                cpu[name].append(cpu_seconds)
                wall[name].append(wall_seconds)
    return Timings(baseline, cpu, wall)


def _percentile(values: list[float], fraction: float) -> float:
    """Of sorted values, by linear interpolation."""
    position = fraction * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (position - below) * (values[above] - values[below])
