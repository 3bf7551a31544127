"""What every figure shares: its frame, the names of layers in it, and its colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from bnkit.dashboard.page.grid import ticks

__all__ = ["DASHES", "THEMES", "axis_of_layers", "colours", "frame", "height_of", "label", "nothing", "row_height"]

_LIGHT = ["#0072b2", "#c24a00", "#007a5c", "#a23b78", "#8f6500", "#4b3fa7", "#2f7f95", "#6b4f3a"]
_DARK = ["#56b4e9", "#f0884a", "#3cc79a", "#e092c0", "#e6b450", "#a79bf5", "#8fd0d9", "#c9ae96"]
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px,1px,2px", "2px,6px")
"""A line is told from the next by its dashes as well as by its colour."""

_LABEL = 26  # characters of a layer's name beside an axis; the whole name is in the hover text


def _theme(text: str, grid: str, surface: str, colours: list[str]) -> dict[str, Any]:
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "tickcolor": grid,
        "zerolinecolor": grid,
        "zerolinewidth": 1,
        "title": {"standoff": 8},
    }
    return {
        "layout": {
            "colorway": colours,
            "font": {"color": text, "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"bgcolor": surface, "bordercolor": grid, "font": {"color": text, "size": 13}},
            "modebar": {"bgcolor": surface, "color": text, "activecolor": colours[0]},
            "xaxis": axis,
            "yaxis": axis,
        }
    }


THEMES = {
    "light": _theme("#3c434b", "#e3e0d9", "#ffffff", _LIGHT),
    "dark": _theme("#c6ccd3", "#363d45", "#22272d", _DARK),
}
"""Templates of plotly, by the page's theme: the figures leave to them every colour that carries no number."""


def frame(*traces: Any, height: int, xaxis: Mapping[str, Any], yaxis: Mapping[str, Any], **layout: Any) -> go.Figure:
    """A figure with the margins and the axes that all have.

    Args:
        *traces: of plotly.
        height: in pixels.
        xaxis: what is special in it.
        yaxis: what is special in it.
        **layout: more of plotly's layout; further axes among it.
    """
    axes = {"xaxis": xaxis, "yaxis": yaxis} | {name: layout.pop(name) for name in [*layout] if "axis" in name}
    return go.Figure(
        list(traces),
        {
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
            "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            **{name: {"automargin": True, **axis} for name, axis in axes.items()},
            **layout,
        },
    )


def nothing() -> go.Figure:
    """The figure of what is not there: without a trace."""
    return go.Figure()


def label(name: str, length: int | None = None) -> str:
    """A layer's name as a text of plotly, which would read tags in it; cut in the middle to a length."""
    if length is not None and len(name) > length:
        head = (length - 1) // 3
        name = name[:head] + "…" + name[len(name) - (length - 1 - head) :]
    return html.escape(name, quote=False) or "(the model itself)"


def row_height(layers: int) -> float:
    """Pixels of a layer's row: readable rows for few layers, thin ones for many."""
    return max(5.0, min(22.0, 560 / max(layers, 1)))


def height_of(layers: int) -> int:
    """Pixels of a figure with a row a layer."""
    return round(100 + max(60.0, row_height(layers) * layers))


def axis_of_layers(names: Sequence[str], first: Sequence[str]) -> dict[str, Any]:
    """A y axis with the layers from top to bottom at 0, 1, …; where they are many, ``first`` are labelled first."""
    labelled = ticks(names, first, math.ceil(14 / row_height(len(names))))
    return {
        "range": [len(names) - 0.5, -0.5],
        "tickvals": labelled,
        "ticktext": [label(names[index], _LABEL) for index in labelled],
        "showgrid": False,
        "zeroline": False,
    }


def colours(rows: list[list[float | None]], unit: str) -> tuple[list[list[float | None]], dict[str, Any]]:
    """The numbers that a heatmap colours, and the arguments of its trace that say how.

    Logarithmic where the values span more than a decade; to both sides of zero where some are negative.
    """
    known = [value for row in rows for value in row if value is not None]
    bar: dict[str, Any] = {"title": {"text": unit, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    low, high = min(known), max(known)
    if low < 0:
        reach = max(abs(low), abs(high))
        return rows, {"colorscale": "RdBu_r", "zmin": -reach, "zmax": reach, "colorbar": bar}
    floor = max(min((value for value in known if value > 0), default=0.0), high * 1e-4)
    if high <= 5 * floor:
        return rows, {"colorscale": "Viridis", "zmin": 0, "zmax": high or 1.0, "colorbar": bar}
    shown = [[None if value is None else round(math.log10(max(value, floor)), 4) for value in row] for row in rows]
    marks = decade_marks(floor, high)
    bar |= {"tickvals": [math.log10(mark) for mark in marks], "ticktext": [f"{mark:g}" for mark in marks]}
    limits = {"zmin": math.log10(floor), "zmax": math.log10(high)}
    return shown, {"colorscale": "Viridis", **limits, "colorbar": bar}


def decade_marks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for a logarithmic scale: about five, whatever the scale spans."""
    span = math.log10(high / low)
    steps = (1, 2, 5) if span < 1.6 else (1, 3) if span < 3.2 else (1,)
    every = max(1, round(span / 6))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, every)
    marks = [step * 10.0**decade for decade in decades for step in steps]
    return [mark for mark in marks if low <= mark <= high]
