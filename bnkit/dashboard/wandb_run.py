"""What a W&B run is told beside the scalars: what the keys are, which layers they name, the final figure and tables.

W&B is imported only by what uses it: who does not log to W&B does not pay for the import.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from bnkit.dashboard.history import TABLES, Cell, RunHistory, Table
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, short_names

if TYPE_CHECKING:
    import wandb

__all__ = ["HEATMAP", "NAMES", "STEP", "TABLE", "are_names", "define_metrics", "log_history", "prefixed"]

STEP = "trainer/global_step"
"""What Lightning's WandbLogger logs beside everything else: the step of the optimizer."""

NAMES = "bn_layers"
"""In the run's config: short layer name, as in the keys -> layer name."""

HEATMAP = "bn_page/heatmap"
TABLE = "bn_table/"

_SUMMARY: dict[str, Literal["max", "mean"]] = {
    # What must not be forgotten because the last step was fine. The others keep W&B's own: the last value, under the
    # key itself. Not the largest: the running statistics start at 0 and 1, and the first step would stand for the run.
    "bn/alarms": "max",
    "bn/nonfinite_layers": "max",
    "bn/unknown_layers": "max",
    "bn/monitor_overhead": "mean",
}


def prefixed(prefix: str, key: str) -> str:
    """The key that Lightning's ``WandbLogger(prefix=...)`` logs under.

    Examples:
        >>> prefixed("", "bn/alarms"), prefixed("teacher", "bn/alarms")
        ('bn/alarms', 'teacher-bn/alarms')
    """
    return f"{prefix}-{key}" if prefix else key


def define_metrics(run: wandb.Run, layers: Iterable[str], *, prefix: str = "") -> None:
    """Tell a run what the keys are, before the first is logged; again after a resume, which changes nothing.

    Every key is defined by its exact name, for a pattern loses to the ``*`` that Lightning defines. All have the global
    step as their x axis; those of single layers are hidden: no chart each unless a panel asks for it. The layers' names
    go to the run's config, under ``NAMES``. Takes about 2 ms a layer, once.

    Args:
        run: that is logged to; of the process that logs.
        layers: names of all layers, in the model's order.
        prefix: of the ``WandbLogger``.
    """
    names = short_names(layers)
    run.define_metric(STEP)
    for key in MODEL_KEYS:
        run.define_metric(prefixed(prefix, key.key), step_metric=STEP, summary=_SUMMARY.get(key.key))
    for measure in LAYER_KEYS:
        for short in names.values():
            run.define_metric(prefixed(prefix, f"{measure.prefix}/{short}"), step_metric=STEP, hidden=True)
    _log_names(run, {short: layer for layer, short in names.items()})


def log_history(run: wandb.Run, history: RunHistory, step: int, *, prefix: str = "") -> None:
    """Log the layer x step heatmap and every table that has rows; nothing where there is neither.

    Args:
        run: that is logged to.
        history: of the run.
        step: the last one, of ``STEP``.
        prefix: of the ``WandbLogger``.
    """
    import wandb

    tables = {TABLE + name: history.tables[name] for name in TABLES if name in history.tables}
    items: dict[str, Any] = {key: _table(table) for key, table in tables.items() if table.rows}
    if any(history.layers("bn_shift").values()):
        try:
            from bnkit.dashboard.page.figures import heatmap
        except ModuleNotFoundError as error:
            warnings.warn(f"W&B gets no heatmap of the layers: {error}; pip install plotly.", stacklevel=2)
        else:
            items[HEATMAP] = wandb.Plotly(heatmap(history, prefix="bn_shift"))
    if items:
        longest = max((len(table.rows) for table in tables.values()), default=0)
        with _whole_tables(longest):
            run.log({prefixed(prefix, key): item for key, item in items.items()} | {STEP: step})


def are_names(value: object) -> bool:
    """Whether a value of a config is a map of short names, of this model or another, and not the user's own entry."""
    return isinstance(value, Mapping) and all(
        isinstance(layer, str) and str(short).startswith(short_names([layer])[layer]) for short, layer in value.items()
    )


def _log_names(run: wandb.Run, names: dict[str, str]) -> None:
    """Write the names to the config, unless something else stands there."""
    config: Any = run.config
    before = config.get(NAMES)
    if before is not None and not are_names(before):
        warnings.warn(
            f"The W&B run's config has a {NAMES!r} of its own, which is left as it is: the layers of the run go by the "
            f"names in its keys. Rename that entry of your config.",
            stacklevel=3,
        )
        return
    config.update({NAMES: names}, allow_val_change=True)


def _table(table: Table) -> wandb.Table:
    import wandb

    rows = [[_finite(cell) for cell in row] for row in table.rows]
    mixed = any(len({_kind(cell) for cell in column if cell is not None}) > 1 for column in zip(*rows, strict=True))
    # Only where it must be: W&B neither sorts nor plots by a column of any type.
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=mixed)


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _kind(cell: Cell) -> type:
    """What W&B calls a type: int and float are one, bool is another."""
    return float if isinstance(cell, int) and not isinstance(cell, bool) else type(cell)


@contextmanager
def _whole_tables(rows: int) -> Iterator[None]:
    """Let W&B write as many rows into the run's directory as it uploads; by itself it leaves out those after 10,000."""
    from wandb import Table as WandbTable

    before = WandbTable.MAX_ROWS
    WandbTable.MAX_ROWS = max(before, min(rows, WandbTable.MAX_ARTIFACT_ROWS))
    try:
        yield
    finally:
        WandbTable.MAX_ROWS = before
