"""Real offline W&B runs, logged as Lightning does, and read back with W&B's own tool."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, per_layer, short_names
from bnkit.dashboard.wandb_run import define_metrics, log_history

HOSTILE = ["layer1.0.bn", "layer1/0 bn", "<script>alert('1')</script>", "größe.β", "a.b.10", "a.b.9", ""]


def history_of(layers: list[str], steps: tuple[int, ...] = (10, 20, 35)) -> RunHistory:
    """Every key and every table, with numbers that have all their digits."""
    random.seed(1)
    names = short_names(layers)
    history = RunHistory(names={short: layer for layer, short in names.items()})
    for step in steps:
        history.log({key.key: random.random() for key in MODEL_KEYS}, step)
        for measure in LAYER_KEYS:
            history.log(per_layer(measure.prefix, {layer: random.gauss(0, 1) for layer in layers}, names), step)
        history.log({"train/loss": random.random() / 3, "val/accuracy": random.random() * 1e-9}, step)
    for layer in layers:
        history.tables["layers"].add(
            layer=layer, kind="BatchNorm2d", channels=8, mean_shift=random.random(), finite=True
        )
        history.tables["channels"].add(layer=layer, channel=0, running_mean=random.random(), running_var=5e-324)
    history.tables["layers"].add(layer="another", source="unknown: it was not called", kl=1e300)
    history.tables["alarms"].add(step=20, layer=layers[0], code="shift", score=7.5, message="<b>far</b> off")
    history.tables["swaps"].add(step=0, layer=layers[0], before="BatchNorm2d", after="Ghost(32)")
    history.tables["recalibrations"].add(step=35, layer=layers[0], mean_shift=0.1 + 0.2, source="layer")
    return history


def rows(history: RunHistory) -> dict[int, dict[str, float]]:
    """Step -> metrics, as they were logged."""
    found: dict[int, dict[str, float]] = {}
    for key, series in history.metrics.items():
        for step, value in series:
            found.setdefault(step, {})[key] = value
    return found


@contextmanager
def offline_logger(folder: Path, prefix: str = "") -> Iterator[WandbLogger]:
    """A WandbLogger with a run of its own, which ends with the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")  # WandbLogger(offline=True) sets it too, and leaves it so
        patch.setenv("WANDB_DATA_DIR", str(folder))
        patch.setenv("WANDB_CACHE_DIR", str(folder))
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        logger = WandbLogger(offline=True, save_dir=folder, project="bnkit", prefix=prefix, settings=settings)
        logger._wandb_init.pop("anonymous", None)  # W&B warns of it; Lightning passes it even when it is not set
        try:
            yield logger
        finally:
            logger.experiment.finish()


def offline_run(folder: Path, history: RunHistory, prefix: str = "") -> Path:
    """Log a history, as a fit does; the run's log."""
    with offline_logger(folder, prefix) as logger:
        if history.names:
            define_metrics(logger.experiment, history.names.values(), prefix=prefix)
        last = 0
        for last, metrics in rows(history).items():
            logger.log_metrics(metrics, step=last)
        log_history(logger.experiment, history, last, prefix=prefix)
    return log_file(folder)


def log_file(folder: Path) -> Path:
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    return log


@cache
def _all_records(log: Path) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]
    output = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    return [json.loads(line) for line in output.splitlines()]


def records(log: Path, kind: str) -> list[dict]:
    """Records of a run that has ended, as `wandb sync` would send them."""
    return [record[kind] for record in _all_records(log) if record["type"] == kind]


def logged(log: Path) -> set[str]:
    """Everything that a panel can ask the run for: its scalars, figures and tables."""
    keys = {key for record in records(log, "history") for key in record["item"]}
    return keys | {key.removesuffix("._type") for key in keys if key.endswith("._type")}
