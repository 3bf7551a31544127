"""The run in a few numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnkit.dashboard.history import Cell, RunHistory
from bnkit.dashboard.page.verdict import alarms, last, last_recalibration, typical
from bnkit.dashboard.page.wording import UNKNOWN, number, percent

__all__ = ["Tile", "tiles"]


@dataclass(frozen=True)
class Tile:
    """One number of the run's state.

    Attributes:
        title: of the number.
        value: the number itself; None where it is not known.
        text: the number as it is shown.
        note: where and when; why it is not known.
        layer: the layer that it is of; empty where it is the model's.
    """

    title: str
    value: Cell
    text: str
    note: str
    layer: str = ""


def tiles(history: RunHistory) -> Iterator[Tile]:
    """The numbers that sum a run up; those that are not known are there too, and say why."""
    raised = alarms(history)
    yield Tile("Alarms", raised, number(raised), "" if raised is not None else "no monitor in this log")
    layers = history.tables["layers"].records()
    read = sum(not str(row["source"] or "unknown").startswith("unknown") for row in layers)
    yield (
        Tile("Layers read", read, f"{read:,}", f"of {len(layers):,}")
        if layers
        else Tile("Layers read", None, UNKNOWN, "no table of layers in this log")
    )
    shift = _worst(history, "mean_shift")
    yield (
        Tile("Largest mean shift now", shift[1], number(shift[1]), "running std", shift[0])
        if shift
        else _metric(history, "bn/shift_worst", "Largest mean shift now", "running std", "no monitor in this log")
    )
    off = last_recalibration(history)
    yield (
        Tile("Off before recalibration", off[2], number(off[2]), f"running std, step {off[0]:,}", off[1])
        if off
        else _metric(
            history,
            "bn/recalibration_shift_worst",
            "Off before recalibration",
            "running std",
            "no recalibration logged",
        )
    )
    gap = last(history, "bn/gap_disagreement")
    note = f"of the predictions, step {gap[0]:,}" if gap else "the train-eval gap was not probed"
    yield Tile("Train-eval gap", gap[1] if gap else None, percent(gap[1] if gap else None), note)
    yield _metric(history, "bn/batch_noise", "Batch noise, median layer", "std", "not logged")
    cost = typical(history, "bn/monitor_overhead")
    note = "of the step, median" if cost is not None else "not logged"
    yield Tile("Monitor's cost", cost, percent(cost), note)


def _metric(history: RunHistory, key: str, title: str, unit: str, otherwise: str) -> Tile:
    found = last(history, key)
    if found is None:
        return Tile(title, None, UNKNOWN, otherwise)
    return Tile(title, found[1], number(found[1]), f"{unit}, step {found[0]:,}")


def _worst(history: RunHistory, column: str) -> tuple[str, float] | None:
    """The layer in which a column of the table of layers is largest, and its value."""
    values = [
        (str(row["layer"]), abs(value))
        for row in history.tables["layers"].records()
        if isinstance(value := row[column], (int, float))
    ]
    return max(values, key=lambda pair: pair[1], default=None)
