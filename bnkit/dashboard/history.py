"""RunHistory: all that the dashboards show of a run, whatever it was logged to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FILE_NAME", "TABLES", "RunHistory", "Table"]

FILE_NAME = "bn_history.json"
"""In the run directory, beside the page: what the page was made from."""

Cell = float | int | str | bool | None

TABLES: dict[str, tuple[str, ...]] = {
    # The last state of every layer. None: not known.
    "layers": (
        "layer",
        "kind",  # "BatchNorm2d", or the variant's spec
        "channels",
        "source",  # "layer": its own batch statistics; "input": reduced from its input; "unknown: WHY"
        "mean_shift",  # rms over channels, running std
        "log_variance_ratio",
        "kl",
        "wasserstein2",  # mean over channels, running std
        "psi",
        "drift",
        "batch_noise",
        "normalization_batch_size",
        "estimation_shift",
        "dropout_shift",
        "dead_fraction",
        "weight",  # rms
        "bias",  # rms
        "finite",
        "alarms",  # how many
    ),
    "alarms": ("step", "layer", "code", "score", "message"),
    # Each change of the layers: at the start, and by a schedule.
    "swaps": ("step", "layer", "before", "after"),
    # Each recalibration and layer: how far the running statistics were off, and the new mean's standard error; both
    # are rms over channels, in running std.
    "recalibrations": ("step", "layer", "mean_shift", "log_variance_ratio", "standard_error", "source"),
    # Channel by channel, at the last recalibration: before (running) and after (population).
    "channels": ("layer", "channel", "running_mean", "running_var", "population_mean", "population_var"),
}
"""Name -> columns."""


@dataclass
class Table:
    """Rows of cells; None is what is not known."""

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def records(self) -> list[dict[str, Cell]]:
        """Each row as a dict by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def add(self, **cells: Cell) -> None:
        """Add a row by column; what is left out, or not finite, is None."""
        unknown = cells.keys() - set(self.columns)
        if unknown:
            raise KeyError(f"The table has no columns {sorted(unknown)}; it has {list(self.columns)}.")
        self.rows.append(tuple(_json(cells.get(column)) for column in self.columns))


@dataclass
class RunHistory:
    """What was logged of a run.

    Attributes:
        metrics: key -> (step, value) in the order of the steps; every scalar that the run has, ``bn…`` and others.
        tables: those of ``TABLES``; without rows where the source does not have them.
        names: short layer name, as in the keys -> layer name. Where it is not known, the short name stands for both.
        info: what is to be said of the run, such as ``{"model": "ResNet", "steps": "1000"}``.
    """

    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=lambda: {name: Table(columns) for name, columns in TABLES.items()})
    names: dict[str, str] = field(default_factory=dict)
    info: dict[str, str] = field(default_factory=dict)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add scalars of a step; what is not finite is left out."""
        for key, value in metrics.items():
            if math.isfinite(value):
                self.metrics.setdefault(key, []).append((step, float(value)))

    def layers(self, prefix: str) -> dict[str, list[tuple[int, float]]]:
        """Layer name -> the series of one measure of [`bnkit.dashboard.keys.LAYER_KEYS`][], in the model's order."""
        found = {key.split("/", 1)[1]: series for key, series in self.metrics.items() if key.startswith(prefix + "/")}
        order = {short: position for position, short in enumerate(self.names)}
        shorts = sorted(found, key=lambda short: order.get(short, len(order)))
        return {self.names.get(short, short): found[short] for short in shorts}

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only; ``from_dict`` gives the same again."""
        return {
            "version": 1,
            "info": dict(self.info),
            "names": dict(self.names),
            "metrics": {key: [list(point) for point in series] for key, series in self.metrics.items()},
            "tables": {
                name: {"columns": list(table.columns), "rows": [list(row) for row in table.rows]}
                for name, table in self.tables.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunHistory:
        """Undo ``to_dict``."""
        history = cls(
            metrics={key: [(int(step), float(v)) for step, v in series] for key, series in values["metrics"].items()},
            names=dict(values["names"]),
            info=dict(values["info"]),
        )
        for name, table in values["tables"].items():
            history.tables[name] = Table(tuple(table["columns"]), [tuple(row) for row in table["rows"]])
        return history

    def save(self, folder: str | Path) -> Path:
        """Write ``FILE_NAME`` into a folder; whole or not at all."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(self.to_dict(), allow_nan=False), encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RunHistory:
        """Read what ``save`` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _json(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value
