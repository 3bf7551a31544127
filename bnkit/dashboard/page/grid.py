"""Many series on one grid of layers and steps, small enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["MAX_COLUMNS", "Grid", "largest", "ticks"]

MAX_COLUMNS = 240
"""More steps than this are put together."""

Series = Sequence[tuple[int, float]]


class Grid(NamedTuple):
    """A row a layer, a column a step or a few steps.

    Attributes:
        steps: the last step of each column.
        rows: layer -> its values; None where the layer was not logged.
        steps_per_column: 1 where every step has its own column.
    """

    steps: list[int]
    rows: dict[str, list[float | None]]
    steps_per_column: int

    @classmethod
    def of(cls, layers: Mapping[str, Series], columns: int = MAX_COLUMNS) -> Grid:
        """Put the series on one grid; of the values in a cell, the one with the largest magnitude stays.

        Args:
            layers: layer -> (step, value); the layers need not have the same steps.
            columns: at most as many.
        """
        steps = sorted({step for series in layers.values() for step, _ in series})
        together = max(1, math.ceil(len(steps) / columns))
        column_of = {step: position // together for position, step in enumerate(steps)}
        width = math.ceil(len(steps) / together)
        rows: dict[str, list[float | None]] = {}
        for layer, series in layers.items():
            row: list[float | None] = [None] * width
            for step, value in series:
                old = row[column_of[step]]
                if old is None or abs(value) >= abs(old):
                    row[column_of[step]] = value
            rows[layer] = row
        ends = [steps[min(together * (column + 1), len(steps)) - 1] for column in range(width)]
        return cls(ends, rows, together)


def largest(layers: Mapping[str, Series], number: int) -> list[str]:
    """The layers with the largest magnitude at any step, the largest first; without those that have no value."""
    peaks = {layer: max(abs(value) for _, value in series) for layer, series in layers.items() if series}
    return sorted(peaks, key=lambda layer: -peaks[layer])[:number]


def ticks(layers: Sequence[str], first: Sequence[str], apart: int) -> list[int]:
    """Positions of the layers that get a label: ``first`` where they fit, then as many of the others as fit.

    Args:
        layers: in the order of the axis.
        first: the layers that matter most, the most important first.
        apart: positions that two labels must be apart.
    """
    position = {layer: index for index, layer in enumerate(layers)}
    chosen: list[int] = []
    for index in [*(position[layer] for layer in first), 0, len(layers) - 1, *range(len(layers))]:
        if all(abs(index - other) >= apart for other in chosen):
            chosen.append(index)
    return sorted(chosen)
