"""The figures: pure functions of a RunHistory, for the page, for W&B and for a notebook.

Each is without a trace where the run does not have its numbers. Colours that carry no number are left to the template,
so that the page can change between light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, LayerKey
from bnkit.dashboard.page.frame import axis_of_layers, colours, frame, height_of, label, nothing
from bnkit.dashboard.page.grid import MAX_COLUMNS, Grid, largest
from bnkit.dashboard.page.traces import REFERENCE, alarm_traces, dots, log_axis, series_traces, step_axis, trace

__all__ = ["channels", "heatmap", "lines", "noise", "recalibration", "worst_layers"]

_KEYS = {key.prefix: key for key in LAYER_KEYS}
_MEDIANS = {"bn_shift": "bn/shift_median", "bn_kl": "bn/kl_median", "bn_drift": "bn/drift_median"}
_CHANNEL = ("running_mean", "running_var", "population_mean", "population_var")
_EPS = 1e-5  # BatchNorm's default; the history does not have the layers' own


def heatmap(history: RunHistory, prefix: str = "bn_shift") -> go.Figure:
    """Layer x step: where and when one measure was large.

    The layers stand in the model's order, the first on top. The colours are logarithmic where the values span more than
    a decade, and go both ways from zero where there are negative values. Above 240 steps, several share a column, which
    shows the largest magnitude; blank is what was not logged.

    Args:
        history: of the run.
        prefix: the measure, a prefix of [`bnkit.dashboard.keys.LAYER_KEYS`][].
    """
    layers = history.layers(prefix)
    if not any(layers.values()):
        return nothing()
    unit = _KEYS.get(prefix, LayerKey(prefix, prefix, "", "")).unit
    grid = Grid.of(layers)
    names = list(layers)
    values = list(grid.rows.values())
    shown, scale = colours(values, unit)
    return frame(
        go.Heatmap(
            x=grid.steps,
            y=list(range(len(names))),
            z=shown,
            text=[
                [None if value is None else label(name) for value in row]
                for name, row in zip(names, values, strict=True)
            ],
            customdata=values,
            hovertemplate="%{text}<br>step %{x}<br><b>%{customdata:.3g}</b> " + unit + "<extra></extra>",
            hoverongaps=False,
            **scale,
        ),
        height=height_of(len(names)),
        xaxis=step_axis(grid.steps) | {"showgrid": False, "zeroline": False},
        yaxis=axis_of_layers(names, largest(layers, 5)),
    )


def worst_layers(history: RunHistory, prefix: str = "bn_shift", number: int = 8) -> go.Figure:
    """The layers in which one measure grew largest, over time, with the median of the model and the alarms.

    Args:
        history: of the run.
        prefix: the measure, a prefix of [`bnkit.dashboard.keys.LAYER_KEYS`][].
        number: layers, at most.
    """
    layers = history.layers(prefix)
    worst = largest(layers, number)
    if not worst:
        return nothing()
    measure = _KEYS.get(prefix, LayerKey(prefix, prefix, "", ""))
    series: dict[str, Sequence[tuple[int, float]]] = {layer: layers[layer] for layer in worst}
    traces = series_traces(series, MAX_COLUMNS)
    median = history.metrics.get(_MEDIANS.get(prefix, ""), [])
    if median:
        traces.append(trace("median of all layers", median, MAX_COLUMNS) | {"line": {**REFERENCE, "width": 3}})
    values = [value for points in [*series.values(), median] for _, value in points]
    spread = min(values) > 0 and max(values) > 10 * min(values)
    return frame(
        *traces,
        *alarm_traces(history, values),
        height=420,
        xaxis=step_axis(step for points in [*series.values(), median] for step, _ in points),
        yaxis={"title": {"text": measure.unit}} | (log_axis(values) if spread else {}),
    )


def lines(history: RunHistory, series: Mapping[str, str], unit: str = "") -> go.Figure:
    """Scalars over time on one pair of axes.

    Args:
        history: of the run.
        series: key in ``RunHistory.metrics`` -> name in the legend; those without a value are left out.
        unit: of all of them.
    """
    found = {name: history.metrics[key] for key, name in series.items() if history.metrics.get(key)}
    if not found:
        return nothing()
    values = [value for points in found.values() for _, value in points]
    yaxis: dict[str, Any] = {"title": {"text": unit}}
    if max(values) == min(values):  # plotly would zoom into the rounding of a constant
        reach = abs(values[0]) or 1.0
        yaxis["range"] = [values[0] - (reach if values[0] else 0.05), values[0] + reach]
    several = len(found) > 1
    xaxis = step_axis(step for points in found.values() for step, _ in points)
    return frame(*series_traces(found), height=260, xaxis=xaxis, yaxis=yaxis, showlegend=several)


def noise(history: RunHistory) -> go.Figure:
    """Layer by layer: the noise of a batch's mean, and the batch size that would bring it to 10 %."""
    rows = [
        row
        for row in history.tables["layers"].records()
        if row["batch_noise"] is not None or row["normalization_batch_size"] is not None
    ]
    if not rows:
        return nothing()
    names = [str(row["layer"]) for row in rows]
    by_noise = sorted(rows, key=lambda row: -_float(row["batch_noise"], 0.0))
    sizes = [row["normalization_batch_size"] for row in rows]
    return frame(
        dots(names, [row["batch_noise"] for row in rows], "std", "batch noise"),
        dots(names, sizes, "samples", "for 10 % noise:") | {"xaxis": "x2"},
        height=height_of(len(names)),
        xaxis={"title": {"text": "batch noise (std)"}, "rangemode": "tozero", "domain": [0, 0.48]},
        xaxis2={"title": {"text": "samples for 10 % noise"}, "domain": [0.52, 1], **log_axis(sizes)},
        yaxis=axis_of_layers(names, [str(row["layer"]) for row in by_noise[:5]]),
        shapes=[{"type": "line", "x0": 0.1, "x1": 0.1, "yref": "paper", "y0": 0, "y1": 1, "line": REFERENCE}],
        showlegend=False,
    )


def recalibration(history: RunHistory) -> go.Figure:
    """Layer by layer at the last recalibration: how far the running mean was off before, and how well it is known."""
    records = history.tables["recalibrations"].records()
    if not records:
        return nothing()
    last = max(_float(row["step"], 0.0) for row in records)
    rows = [row for row in records if row["step"] == last]
    names = [str(row["layer"]) for row in rows]
    before, after = ([row[key] for row in rows] for key in ("mean_shift", "standard_error"))
    traces = [
        dots(names, before, "running std", "before") | {"name": "before: how far it was off"},
        dots(names, after, "", "standard error")
        | {"name": "after: standard error", "marker": {"symbol": "diamond-open", "size": 7}},
    ]
    worst = sorted(rows, key=lambda row: -_float(row["mean_shift"], 0.0))[:5]
    return frame(
        *traces,
        height=height_of(len(names)) + 24,
        xaxis={"title": {"text": "running std"}} | log_axis([*before, *after]),
        yaxis=axis_of_layers(names, [str(row["layer"]) for row in worst]),
    )


def channels(history: RunHistory, layer: str) -> go.Figure:
    """Channel by channel of one layer: running against population statistics, at the last recalibration.

    Args:
        history: of the run.
        layer: its name.
    """
    table = history.tables["channels"]
    of_layer = (dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == layer)
    rows = [row for row in of_layer if all(row[key] is not None for key in _CHANNEL)]
    if not rows:
        return nothing()
    running_mean, running_var, mean, var = ([_float(row[key], 0.0) for row in rows] for key in _CHANNEL)
    std = [math.sqrt(max(value, 0.0) + _EPS) for value in running_var]
    in_std = [[value / s for value, s in zip(values, std, strict=True)] for values in (running_mean, mean)]
    stds = [std, [math.sqrt(max(value, 0.0) + _EPS) for value in var]]
    panels = ((in_std[0], in_std[1], ""), (stds[0], stds[1], "2"))
    wide = max(map(max, stds)) > 30 * min(map(min, stds))
    of_std = log_axis([*stds[0], *stds[1]]) if wide else {}
    return frame(
        *(_against(x, y, [row["channel"] for row in rows], axes) for x, y, axes in panels),
        *(_same(x, y, axes) for x, y, axes in panels),
        height=360,
        xaxis={"title": {"text": "running mean (running std)"}, "domain": [0, 0.45]},
        yaxis={"title": {"text": "population mean (running std)"}},
        xaxis2={"title": {"text": "running std"}, "domain": [0.56, 1], **of_std},
        yaxis2={"title": {"text": "population std"}, "anchor": "x2", **of_std},
        showlegend=False,
    )


def _against(x: Sequence[float], y: Sequence[float], names: Sequence[Any], axes: str) -> dict[str, Any]:
    """A dot a channel."""
    return {
        "type": "scatter",
        "xaxis": f"x{axes}",
        "yaxis": f"y{axes}",
        "x": [_round(value) for value in x],
        "y": [_round(value) for value in y],
        "customdata": list(names),
        "mode": "markers",
        "marker": {"size": 7, "opacity": 0.75},
        "hovertemplate": "channel %{customdata}<br>running %{x:.3g}<br>population %{y:.3g}<extra></extra>",
    }


def _same(x: Sequence[float], y: Sequence[float], axes: str) -> dict[str, Any]:
    """The line on which x and y are the same."""
    ends = [min([*x, *y]), max([*x, *y])]
    axis = {"xaxis": f"x{axes}", "yaxis": f"y{axes}"}
    return {"type": "scatter", **axis, "x": ends, "y": ends, "mode": "lines", "line": REFERENCE, "hoverinfo": "skip"}


def _float(value: Any, unknown: float) -> float:
    return unknown if value is None else float(value)


def _round(value: float) -> float:
    return float(f"{value:.6g}")
