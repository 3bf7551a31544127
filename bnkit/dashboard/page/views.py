"""What the page is filled with: tables and drawings, free of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bnkit.dashboard.history import Cell, RunHistory
from bnkit.dashboard.page.wording import UNKNOWN, number

__all__ = ["Drawing", "PageCell", "PageTable", "Section", "Variant", "table_view"]

TITLES = {
    "channels": "channels",
    "mean_shift": "mean shift (running std)",
    "log_variance_ratio": "log variance ratio",
    "kl": "KL (nats)",
    "wasserstein2": "Wasserstein-2 (running std)",
    "psi": "PSI",
    "drift": "drift (std)",
    "batch_noise": "batch noise (std)",
    "normalization_batch_size": "batch for 10 % noise",
    "estimation_shift": "estimation shift (running std)",
    "dropout_shift": "dropout shift (log ratio)",
    "dead_fraction": "dead channels (fraction)",
    "weight": "|γ| (rms)",  # noqa: RUF001
    "bias": "|β| (rms)",
    "source": "read from",
}
"""Column of a table -> its title, where that is not the column's own name."""


class PageCell(NamedTuple):
    """A cell as it is shown, with its full value."""

    text: str
    value: str
    kind: str  # "name", "word", "text", "flag", "number" or "unknown"


@dataclass
class PageTable:
    """A table of the page; the first column names the row."""

    caption: str
    columns: list[str]
    rows: list[list[PageCell]]
    identifier: str = ""
    filterable: bool = False
    numeric: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = [{row[index].kind for row in self.rows} for index in range(len(self.columns))]
        self.numeric = ["number" in kind and kind <= {"number", "unknown"} for kind in kinds]


@dataclass
class Variant:
    """One of the figures that a drawing can show.

    Attributes:
        name: in the list of the drawing's figures.
        figure: of plotly, as plain values.
        alternative: the figure in words.
        table: its numbers: columns and rows.
        note: on how the figure was made, where that is worth saying.
    """

    name: str
    figure: dict[str, Any]
    alternative: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass
class Drawing:
    """A figure, or several of which one is shown.

    Attributes:
        identifier: in the page.
        title: its heading.
        how: one sentence on how to read it.
        variants: the figures, the first shown first.
        chooser: label of the list of variants, where there are several.
        small: whether several may stand side by side; these come last in a section.
    """

    identifier: str
    title: str
    how: str
    variants: list[Variant]
    chooser: str = ""
    small: bool = False


@dataclass
class Section:
    """A part of the page; ``missing`` says what it does not show, and how to get it."""

    identifier: str
    title: str
    how: str
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def widths(self) -> list[str]:
        """Of each drawing: "full", "half" or "third", so that rows of small ones are filled to the end."""
        small = sum(drawing.small for drawing in self.drawings)
        halves = {0: 0, 1: 4, 2: 2}[small % 3] if small > 1 else 0
        widths = ["full"] * (len(self.drawings) - small) + ["third"] * (small - halves) + ["half"] * halves
        return widths if small != 1 else ["full"] * len(self.drawings)


def table_view(
    history: RunHistory,
    name: str,
    caption: str,
    columns: Iterable[str] | None = None,
    *,
    filterable: bool = False,
    first: str = "layer",
) -> PageTable:
    """A table of the history for the page, with the naming column first.

    Args:
        history: of the run.
        name: of the table.
        caption: what it says.
        columns: those to show, in this order; None: all.
        filterable: whether the page offers to search it.
        first: the column that names a row.
    """
    table = history.tables[name]
    records = table.records()
    wanted = [column for column in columns or table.columns if column in table.columns]
    if "step" in table.columns:
        records.sort(key=lambda record: (record["step"] is None, record["step"]))  # stable: the model's order within
    ordered = [first, *(column for column in wanted if column != first)]
    return PageTable(
        caption,
        [TITLES.get(column, column) for column in ordered],
        [[_cell(column, record[column]) for column in ordered] for record in records],
        identifier=name,
        filterable=filterable,
    )


def _cell(column: str, value: Cell) -> PageCell:
    if value is None:
        return PageCell(UNKNOWN, "", "unknown")
    if isinstance(value, str):
        shown = value or ("(the model itself)" if column == "layer" else "")
        kinds = {"message": "text", "source": "text", "code": "word"}
        return PageCell(shown, value, kinds.get(column, "name"))
    if isinstance(value, bool):
        return PageCell(number(value), str(int(value)), "flag")
    return PageCell(number(value), repr(value), "number")
