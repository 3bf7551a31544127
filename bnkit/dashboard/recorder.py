"""Recorder: the scalars of a run of any length, in memory and in checkpoints of bounded size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from bnkit.dashboard.history import RunHistory

__all__ = ["Recorder"]


class Recorder:
    """Adds scalars to a history, and thins it out evenly over the whole run where it becomes too long.

    Steps fall into buckets of equal size, of which each series keeps the last value; the size is 1 until there are too
    many points, and doubles whenever there are. So a long run is seen at one resolution from its begin to its end, and
    a series always ends with its latest value.

    Args:
        history: to add to.
        points: to keep at most, of all series together; with 200,000 a checkpoint grows by about 3 MB.
        whole: series up to this length are not thinned out, such as those of validations. Where there are more than
            ``points / whole`` series, the limit is ``whole`` points for each.
    """

    def __init__(self, history: RunHistory, points: int = 200_000, whole: int = 200) -> None:
        self.history = history
        self.bucket = 1
        self._at_most, self._whole = points, whole
        self._points = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add scalars of a step; what is not finite is left out, and of two values of one step the later one stands."""
        for key, value in metrics.items():
            if not math.isfinite(value):
                continue
            series = self.history.metrics.setdefault(key, [])
            if series and (
                series[-1][0] == step or (len(series) > self._whole and self._together(series[-1][0], step))
            ):
                series[-1] = (step, float(value))
            else:
                series.append((step, float(value)))
                self._points += 1
        while self._points > max(self._at_most, self._whole * len(self.history.metrics)):
            self.bucket *= 2
            self._thin()

    def state_dict(self) -> dict[str, Any]:
        """All series in three tensors, however many there are."""
        metrics = self.history.metrics
        points = [point for series in metrics.values() for point in series]
        return {
            "bucket": self.bucket,
            "keys": list(metrics),
            "lengths": torch.tensor([len(series) for series in metrics.values()], dtype=torch.int64),
            "steps": torch.tensor([step for step, _ in points], dtype=torch.int64),
            "values": torch.tensor([value for _, value in points], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, in place of all series so far."""
        points = iter(zip(state["steps"].tolist(), state["values"].tolist(), strict=True))
        self.history.metrics = {
            key: [next(points) for _ in range(length)]
            for key, length in zip(state["keys"], state["lengths"].tolist(), strict=True)
        }
        self.bucket = state["bucket"]
        self._points = len(state["steps"])

    def _together(self, one: int, other: int) -> bool:
        return one // self.bucket == other // self.bucket

    def _thin(self) -> None:
        for key, series in self.history.metrics.items():
            if len(series) > self._whole:
                followers = [*series[1:], None]
                self.history.metrics[key] = [
                    point
                    for point, after in zip(series, followers, strict=True)
                    if after is None or not self._together(point[0], after[0])
                ]
        self._points = sum(map(len, self.history.metrics.values()))
