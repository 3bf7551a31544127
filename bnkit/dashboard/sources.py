"""Read what was logged of a run, from whatever logged it: bnkit itself, a CSV logger, or W&B's offline log."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bnkit.dashboard.history import FILE_NAME, TABLES, RunHistory, Table
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS
from bnkit.dashboard.wandb_run import NAMES, STEP, TABLE, are_names

__all__ = ["read"]

_CSV = "metrics.csv"
_TENSORBOARD = "events.out.tfevents."


def read(path: str | Path) -> RunHistory:
    """Read a run.

    Args:
        path: a ``bn_history.json``; the ``metrics.csv`` of a ``CSVLogger``; the ``.wandb`` file of a W&B run; or a
            directory with one of them in it or below, looked for in this order.

    Returns:
        Every scalar of the run, of BatchNorm or not. A CSV has neither tables nor layer names: there the tables have no
        rows, and the layers go by the names in the keys. A logger's ``prefix`` is taken off the keys, and is in
        ``info["prefix"]``.

    Raises:
        FileNotFoundError: When the path does not exist.
        ValueError: When there is nothing to read, or more than one run, or a file is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the directory of a run, or one of its logs.")
    if path.is_file():
        return _read_file(path)
    if (path / FILE_NAME).is_file():
        return _read_file(path / FILE_NAME)
    for pattern in (FILE_NAME, _CSV, "*.wandb"):
        # W&B's latest-run is a link, and a second run only where a copy of the directory has followed it
        found = sorted(file for file in path.rglob(pattern) if file.is_file() and file.parent.name != "latest-run")
        if len(found) > 1:
            some = ", ".join(str(file.relative_to(path)) for file in found[:4]) + (", ..." if len(found) > 4 else "")
            raise ValueError(f"{path} has {len(found)} runs in it, give the path of one: {some}.")
        if found:
            return _read_file(found[0])
    if any(path.rglob(_TENSORBOARD + "*")):
        raise _tensorboard(path)
    raise ValueError(
        f"{path} has no run in it: looked, also below, for {FILE_NAME}, {_CSV} (CSVLogger) and *.wandb (WandbLogger). "
        f"Give the directory of a run, or log the next one with a CSVLogger or a WandbLogger."
    )


def _tensorboard(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a TensorBoard log, which is not read here: log with a CSVLogger or a WandbLogger too "
        f"(Trainer(logger=[...]))."
    )


def _read_file(path: Path) -> RunHistory:
    if path.suffix == ".wandb":
        return _read_wandb(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".json":
        try:
            return RunHistory.load(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a {FILE_NAME} that bnkit wrote ({error!r}); give another.") from error
    if path.name.startswith(_TENSORBOARD):
        raise _tensorboard(path)
    raise ValueError(f"{path} is not a log that is read here: give a {FILE_NAME}, a {_CSV}, or a .wandb file.")


def _read_csv(path: Path) -> RunHistory:
    rows: list[tuple[int, dict[str, float]]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictReader(file)
        if "step" not in (table.fieldnames or ()):
            raise ValueError(f"{path} has no column 'step': give the {_CSV} of Lightning's CSVLogger.")
        for row in table:
            step = _number(row.pop("step"))
            if step is None:
                raise ValueError(f"{path}, line {table.line_num}: the step is not a number; mend or delete the line.")
            rows.append((int(step), {key: v for key, cell in row.items() if (v := _number(cell)) is not None}))
    return _history(rows, {"source": f"CSV, {path.name}"})


def _number(cell: str | list[str] | None) -> float | None:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # an empty cell, a text, a line that is too short or too long
        return None


def _read_wandb(path: Path) -> RunHistory:
    """Read the log of a W&B run, its tables from the files beside it."""
    rows: list[tuple[int, dict[str, float]]] = []
    tables: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    info = {"source": f"W&B, {path.name}"}
    finished = False
    last: int | None = None
    for record in _wandb_records(path):
        kind = record["type"]
        content = record[kind]
        if kind == "run":
            info |= {field: str(content[field]) for field in ("run_id", "project") if field in content}
        if kind in ("run", "config"):
            config = content.get("update") or content.get("config", {}).get("update", {})
            names = config[NAMES] if are_names(config.get(NAMES)) else names
        elif kind == "history":
            item: dict[str, Any] = content["item"]
            media = {key.removesuffix("._type"): value for key, value in item.items() if key.endswith("._type")}
            for key in (key for key, type_ in media.items() if type_ == "table-file"):
                tables[key] = {field: item.get(f"{key}.{field}") for field in ("path", "nrows")}
            last = item.get(STEP, last)
            step = item.get("_step", len(rows)) if last is None else last
            rows.append((int(step), dict(_scalars(item, media))))
        finished |= kind == "exit"
    if not finished:
        info["state"] = "not finished, or its log is not whole"
    history = _history(rows, info, tables)
    prefix = history.info.get("prefix")
    for name in TABLES:
        if found := tables.get(f"{prefix}-{TABLE}{name}" if prefix else TABLE + name):
            _add_table(history, name, path.parent / "files" / str(found["path"]), found["nrows"])
    # W&B sorts the names; the last table has the model's order.
    order = {row["layer"]: position for position, row in enumerate(history.tables["layers"].records())}
    ordered = sorted(names, key=lambda short: (order.get(names[short], len(order)), _natural(names[short])))
    history.names = {short: names[short] for short in ordered}
    return history


def _wandb_records(path: Path) -> Iterator[dict[str, Any]]:
    """Each record of a W&B log, by W&B's own reader."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"{path} is read by W&B's own reader, and W&B is not installed: pip install wandb.")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path.resolve())]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        # there, for Python to find no other package by the name of W&B in the working directory
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, encoding="utf-8", cwd=path.parent)
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                record = json.loads(line)
                if record["type"] in ("run", "config", "history", "exit"):
                    yield record
        if process.returncode:
            said.seek(0)
            why = (said.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ValueError(f"W&B cannot read {path} ({why}); give a whole .wandb file, and use wandb>=0.31.")


def _scalars(item: dict[str, Any], media: Iterable[str]) -> Iterator[tuple[str, float]]:
    """What was logged as a number: not W&B's own fields, and not those of a figure or a table."""
    fields = tuple(f"{key}." for key in media)
    for key, value in item.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and key != STEP and not key.startswith("_") and not key.startswith(fields):
            yield key, value


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer2 before layer10."""
    return [(int(number or -1), text) for text, number in re.findall(r"([^0-9]+)|([0-9]+)", name)]


def _add_table(history: RunHistory, name: str, file: Path, rows: int | None) -> None:
    if not file.is_file():
        history.info[f"table {name}"] = "not known, its file is gone"
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    table = Table(tuple(content["columns"]), [tuple(row) for row in content["data"]])
    history.tables[name] = table
    if rows is not None and len(table.rows) < rows:
        history.info[f"table {name}"] = f"the first {len(table.rows)} of {rows} rows"


def _history(
    rows: Iterable[tuple[int, dict[str, float]]], info: dict[str, str], others: Iterable[str] = ()
) -> RunHistory:
    """Put rows in the order of the steps, and take a logger's prefix off the keys."""
    rows = sorted(rows, key=lambda row: row[0])
    prefix = _prefix([key for _, metrics in rows for key in metrics] + list(others))
    history = RunHistory(info=info | ({"prefix": prefix} if prefix else {}))
    for step, metrics in rows:
        history.log({key.removeprefix(f"{prefix}-") if prefix else key: v for key, v in metrics.items()}, step)
    return history


def _prefix(keys: Iterable[str]) -> str:
    """The prefix of a logger, which joins it with a "-": known by the keys of this package; "" where there is none."""
    model = {key.key for key in MODEL_KEYS}
    families = {key.prefix for key in LAYER_KEYS} | {TABLE.rstrip("/")}
    for key in dict.fromkeys(keys):
        if (key in model) or (key.split("/", 1)[0] in families):
            return ""
        match = re.fullmatch(r"(.+?)-((bn\w*)/.+)", key)
        if match and (match[2] in model or match[3] in families):
            return match[1]
    return ""
