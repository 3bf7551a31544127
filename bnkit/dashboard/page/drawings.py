"""Figures made ready for the page: with their words and their numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from bnkit.dashboard.history import Cell, RunHistory
from bnkit.dashboard.keys import MODEL_KEYS
from bnkit.dashboard.page import figures
from bnkit.dashboard.page.grid import MAX_COLUMNS, Grid, largest
from bnkit.dashboard.page.views import Drawing, Variant
from bnkit.dashboard.page.wording import count, number

__all__ = [
    "channels_by_layer",
    "extremes",
    "heatmap_of",
    "line_drawing",
    "peak_words",
    "plain",
    "small_drawings",
    "zeros",
]

_MODEL = {key.key: key for key in MODEL_KEYS}


def heatmap_of(history: RunHistory, prefix: str, title: str, meaning: str) -> Variant | None:
    """The heatmap of one measure; None where it was not logged."""
    figure = figures.heatmap(history, prefix)
    if not figure.data:
        return None
    layers = history.layers(prefix)
    grid = Grid.of(layers)
    notes = []
    if grid.steps_per_column > 1:
        notes.append(f"A column is {grid.steps_per_column} logged steps, and shows the largest of them.")
    if any(len(series) < len(max(layers.values(), key=len)) for series in layers.values()):
        notes.append("Blank: not logged at that step (above 100 layers, only the worst 20 are).")
    if len(layers) < len(history.names):
        others = len(history.names) - len(layers)
        notes.append(f"Not shown, since never logged: {count(others, 'other layer')}.")
    return Variant(
        title,
        plain(figure),
        f"{title} of {count(len(layers), 'layer')} at up to {MAX_COLUMNS} steps; the largest, {peak_words(layers)}.",
        *extremes(layers, "layer"),
        note=" ".join([f"{title}: {meaning}.", *notes]),
    )


def small_drawings(history: RunHistory, section: str, keys: Collection[str] = tuple(_MODEL)) -> Iterator[Drawing]:
    """A small figure for each title, of the keys whose titles differ only after the comma; none of zeros alone."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in MODEL_KEYS:
        if key.section == section and key.key in keys and any(value for _, value in history.metrics.get(key.key, [])):
            title, _, which = key.title.partition(", ")
            groups.setdefault((title, key.unit), {})[key.key] = which or title
    titles = [title for title, _ in groups]
    for (title, unit), series in groups.items():
        first = next(iter(series))
        meaning = _MODEL[first].meaning
        if meaning.split()[0] in ("that", "with", "seen", "in"):  # it goes on from the unit
            meaning = f"{unit} {meaning}"
        full = f"{title} ({unit})" if titles.count(title) > 1 else title
        yield line_drawing(history, first.replace("/", "-"), full, series, unit, meaning)


def zeros(history: RunHistory, section: str) -> list[str]:
    """What was logged and was 0 throughout, in a sentence or none: there is nothing to draw."""
    titles = [
        key.title
        for key in MODEL_KEYS
        if key.section == section and (points := history.metrics.get(key.key)) and not any(value for _, value in points)
    ]
    return [f"Zero throughout: {'; '.join(titles)}."] if titles else []


def line_drawing(
    history: RunHistory, identifier: str, title: str, series: Mapping[str, str], unit: str = "", meaning: str = ""
) -> Drawing:
    """Scalars over time, as a small drawing."""
    found = {name: history.metrics[key] for key, name in series.items()}
    ends = "; ".join(f"{name}: {number(points[-1][1])} at step {points[-1][0]:,}" for name, points in found.items())
    how = meaning if meaning.startswith("cos(") else meaning[:1].upper() + meaning[1:]
    figure = plain(figures.lines(history, series, unit))
    variant = Variant("", figure, f"{title}, last: {ends}.", *extremes(found, "series"))
    return Drawing(identifier, title, how, [variant], small=True)


def channels_by_layer(history: RunHistory) -> list[Variant]:
    """Running against population of each layer; that which was off most first."""
    records = history.tables["recalibrations"].records()
    shift = {row["layer"]: float(row["mean_shift"] or 0) for row in records}  # of the last one
    rows: dict[Cell, list[list[Cell]]] = {}
    for layer, *cells in history.tables["channels"].rows:
        rows.setdefault(layer, []).append(cells)
    widths = {row["layer"]: row["channels"] for row in history.tables["layers"].records()}
    variants = []
    for layer in sorted(rows, key=lambda layer: -shift.get(layer, 0.0)):
        figure = figures.channels(history, str(layer))
        if figure.data:
            variants.append(
                Variant(
                    str(layer),
                    plain(figure),
                    f"Running against population mean and std of {count(len(rows[layer]), 'channel')}.",
                    ["channel", "running mean", "running variance", "population mean", "population variance"],
                    rows[layer],
                    note=_some_of(len(rows[layer]), widths.get(layer)),
                )
            )
    return variants


def _some_of(shown: int, channels: Cell) -> str:
    return (
        f"{shown} of {channels} channels were kept in the log."
        if isinstance(channels, int) and channels > shown
        else ""
    )


def extremes(series: Mapping[str, Sequence[tuple[int, float]]], what: str) -> tuple[list[str], list[list[Cell]]]:
    """A figure's numbers as a table that stays small: last, smallest and largest of each line."""
    rows: list[list[Cell]] = []
    for name, points in series.items():
        if points:
            low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
            rows.append([name, len(points), points[-1][1], points[-1][0], low[1], low[0], high[1], high[0]])
    return [what, "points", "last", "at step", "smallest", "at step", "largest", "at step"], rows


def peak_words(layers: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Where and when the largest magnitude was."""
    [name] = largest(layers, 1)
    step, value = max(layers[name], key=lambda point: abs(point[1]))
    return f"{number(value)}, in {name} at step {step:,}"


def plain(figure: Any) -> dict[str, Any]:
    """The figure without its template, which the page sets by its theme."""
    values: dict[str, Any] = figure.to_plotly_json()
    values["layout"].pop("template", None)
    return values
