"""The traces that the figures are made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page.frame import DASHES, decade_marks, label
from bnkit.dashboard.page.grid import Grid

__all__ = ["MAX_POINTS", "REFERENCE", "alarm_traces", "dots", "log_axis", "series_traces", "step_axis", "trace"]

REFERENCE = {"color": "#8a9099", "width": 1.5, "dash": "dash"}
"""The line of what the others are compared with."""

MAX_POINTS = 1000
"""More points of a line than this are put together."""

_ALARM = "#d1481f"  # readable on both themes


def series_traces(series: Mapping[str, Sequence[tuple[int, float]]], columns: int = MAX_POINTS) -> list[dict[str, Any]]:
    """A line a series, each with its own dashes."""
    return [
        trace(name, points, columns) | {"line": {"dash": DASHES[index % len(DASHES)], "width": 1.75}}
        for index, (name, points) in enumerate(series.items())
    ]


def trace(name: str, points: Sequence[tuple[int, float]], columns: int = MAX_POINTS) -> dict[str, Any]:
    """A line over the steps; of more points than ``columns``, the largest magnitudes."""
    grid = Grid.of({name: points}, columns)
    return {
        "type": "scatter",
        "x": grid.steps,
        "y": grid.rows[name],
        "mode": "lines+markers" if len(grid.steps) < 30 else "lines",
        "marker": {"size": 5},
        "name": label(name, 40),
        "text": label(name),
        "hovertemplate": "%{text}<br>step %{x}<br><b>%{y:.3g}</b><extra></extra>",
    }


def dots(names: Sequence[str], values: Sequence[Any], unit: str, what: str) -> dict[str, Any]:
    """A dot a layer, at the layer's place on ``bnkit.dashboard.page.frame.axis_of_layers``."""
    known = [(row, value) for row, value in enumerate(values) if value is not None]
    return {
        "type": "scatter",
        "x": [value for _, value in known],
        "y": [row for row, _ in known],
        "text": [label(names[row]) for row, _ in known],
        "mode": "markers",
        "marker": {"size": 7},
        "hovertemplate": "%{text}<br>" + what + " <b>%{x:.3g}</b> " + unit + "<extra></extra>",
    }


def alarm_traces(history: RunHistory, values: Sequence[float]) -> list[dict[str, Any]]:
    """A vertical line and a mark on top at each step with an alarm."""
    by_step: dict[int, list[str]] = {}
    for row in history.tables["alarms"].records():
        if isinstance(row["step"], int):
            words = textwrap.wrap(str(row["message"] or row["layer"]), 70)
            by_step.setdefault(row["step"], []).append("<br>".join(map(label, words)))
    if not by_step:
        return []
    low, high = min(values), max(values)
    texts = [
        f"step {step}<br>" + "<br>".join(messages[:4]) + (f"<br>and {len(messages) - 4} more" if messages[4:] else "")
        for step, messages in by_step.items()
    ]
    edges = {"x": [x for step in by_step for x in (step, step, None)], "y": [low, high, None] * len(by_step)}
    return [
        {"type": "scatter", **edges, "mode": "lines", "line": {"color": _ALARM, "width": 1}, "opacity": 0.45}
        | {"hoverinfo": "skip", "showlegend": False},
        {"type": "scatter", "x": list(by_step), "y": [high] * len(by_step), "mode": "markers", "name": "alarm"}
        | {"marker": {"symbol": "triangle-down", "size": 11, "color": _ALARM}, "text": texts}
        | {"hovertemplate": "%{text}<extra></extra>"},
    ]


def log_axis(values: Sequence[Any]) -> dict[str, Any]:
    """A logarithmic axis, where there is a value that it can show."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive:
        return {}
    marks = decade_marks(min(positive) / 2, max(positive) * 2)
    return {"type": "log", "tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}


def step_axis(steps: Iterable[int]) -> dict[str, Any]:
    """The axis of the steps, which are whole numbers also where there are few of them."""
    different = sorted(set(steps))
    axis: dict[str, Any] = {"title": {"text": "step"}}
    if len(different) == 1:
        return axis | {"tickvals": different, "range": [different[0] - 1, different[0] + 1]}
    return axis | ({"dtick": 1} if different[-1] - different[0] < 8 else {})
