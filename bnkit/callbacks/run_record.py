"""What a fit leaves behind of its BatchNorm layers: scalars in every logger, W&B's tables, the page, the terminal."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.callbacks.recalibration import BatchNormRecalibration
from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import short_names
from bnkit.dashboard.recorder import Recorder
from bnkit.dashboard.scalars import add_recalibration, kind, layer_table, recalibration_scalars
from bnkit.dashboard.terminal import worst_layers
from bnkit.monitoring import Monitor
from bnkit.monitoring.snapshot import Snapshot
from bnkit.norms import original_class
from bnkit.report import RecalibrationReport

__all__ = ["PAGE", "RunRecord", "step_of"]

log = logging.getLogger(__name__)

PAGE = "report.html"


def step_of(trainer: Trainer) -> int:
    """Lightning's own x axis, which with several optimizers is not the global step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class RunRecord:
    """Keeps the history of a fit, and hands it on. It is kept on rank 0; on the others there is none.

    Args:
        report: whether to write the page.
        report_dir: where to; None: the directory of the first logger.

    Attributes:
        is_open: whether a fit is going on whose history is kept here.
        history: of that fit, or of the last one.
        names: layer name -> short name.
    """

    def __init__(self, report: bool, report_dir: str | Path | None) -> None:
        self._report, self._given_dir = report, report_dir
        self._folder: Path | None = None
        self.is_open = False
        self.history = RunHistory()
        self.names: dict[str, str] = {}
        self._recorder = Recorder(self.history)
        self._layers: Mapping[str, _BatchNorm] = {}
        self._kinds: dict[str, str] = {}
        self._estimation: dict[str, float] = {}
        self._seen_reports: dict[Callback, RecalibrationReport | None] = {}

    @staticmethod
    def prepare(trainer: Trainer) -> None:
        """Where processes are spawned or forked, let W&B write a run's files where the run is.

        A process that attaches to a run takes the working directory for the run's, and W&B would not send the files.
        """
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            for logger in _wandb(trainer):
                import wandb

                folder = str(logger.save_dir or ".")
                wandb.setup().settings.root_dir = folder
                if isinstance(logger.experiment, wandb.Run):  # where it has attached already
                    logger.experiment._settings.root_dir = folder

    def start(self, trainer: Trainer, pl_module: LightningModule, layers: Mapping[str, _BatchNorm]) -> None:
        """Begin a fit, and tell W&B what will be logged. To be called on every rank: the directory is agreed on."""
        self.history = RunHistory(info={"model": type(pl_module).__name__, "processes": str(trainer.world_size)})
        self._recorder = Recorder(self.history)
        self.names, self._layers = short_names(layers), layers
        self.history.names = {short: name for name, short in self.names.items()}
        self._kinds, self._estimation = {}, {}
        # A recalibration of an earlier fit with the same callbacks is none of this one's.
        self._seen_reports = {callback: callback.report for callback in _recalibrations(trainer)}
        folder = self._given_dir or (trainer.log_dir if trainer.loggers else None)
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._folder = None if folder is None or not self._report or dry else Path(folder)
        self.is_open = trainer.is_global_zero
        for logger in _wandb(trainer) if self.is_open else ():
            from bnkit.dashboard.wandb_run import define_metrics

            define_metrics(logger.experiment, layers, prefix=logger._prefix)

    def log(self, trainer: Trainer, scalars: Mapping[str, float]) -> None:
        """Log to every logger; what is not finite is not known, and left out."""
        known = {key: value for key, value in scalars.items() if math.isfinite(value)}
        if not known or not self.is_open:
            return
        step = step_of(trainer)
        self._recorder.log(known, step)
        for logger in trainer.loggers:
            logger.log_metrics(known, step=step)

    def look_at_kinds(self, trainer: Trainer) -> None:
        """Take up what the layers have become since the last time, by whatever swapped them."""
        for name, layer in self._layers.items() if self.is_open else ():
            before, now = self._kinds.get(name, original_class(layer).__name__), kind(layer)
            if now != before:
                self._kinds[name] = now
                self.history.tables["swaps"].add(step=step_of(trainer), layer=name, before=before, after=now)

    def measured(self, trainer: Trainer) -> None:
        """Take up what the module has logged in the loop that ends now: a validation, or an epoch of training.

        To be called on every rank: a metric that nobody has asked for yet is reduced over the ranks here.
        """
        results = trainer._results
        if results is None:
            return
        # Not all of trainer.callback_metrics: some are still of the epoch before.
        metrics = results.metrics(on_step=False)["callback"]
        if self.is_open:
            self._recorder.log({key: float(value) for key, value in metrics.items()}, step_of(trainer))

    def recalibrated(self, trainer: Trainer) -> None:
        """Take up the report of a recalibration since the last time."""
        if not self.is_open:
            return
        step = step_of(trainer)
        for callback in _recalibrations(trainer):
            report = callback.report
            if report is None or report is self._seen_reports.get(callback):
                continue
            self._seen_reports[callback] = report
            self._estimation |= {name: layer.shift for name, layer in report.layers.items()}
            add_recalibration(self.history, report, self._layers, step)
            # What the callback itself has logged, for the page; and what it leaves to the monitor: the layers.
            self._recorder.log(callback.scalars(report), step)
            self.log(trainer, recalibration_scalars(report, self.names))

    def finish(self, trainer: Trainer, monitor: Monitor, snapshot: Snapshot | None) -> None:
        """Hand the history on: to W&B, to the page, to the terminal."""
        if not self.is_open:
            return
        self._fill(trainer, monitor, snapshot)
        self._tell_wandb(trainer)
        try:
            self._write()
        except OSError as error:  # a full disk is no reason to lose what comes after a fit
            rank_zero_warn(
                f"ActivationShiftMonitor could not write its page ({error}): give report_dir= another folder."
            )
            self._folder = None
        self.is_open = False
        if snapshot is not None:
            print(f"\n{worst_layers(snapshot, monitor.alarms)}")
            if self._folder is not None:
                print(f"All layers and steps: {self._folder / PAGE}")

    def abandon(self, trainer: Trainer, monitor: Monitor, snapshot: Snapshot | None, exception: BaseException) -> None:
        """Hand on the history of a fit that has failed, as far as it is known; the failure itself matters more."""
        if not self.is_open:
            return
        self.is_open = False
        self.history.info["ended by"] = type(exception).__name__
        with suppress(Exception):
            self._fill(trainer, monitor, snapshot)
            self._write()
        with suppress(Exception):
            self._tell_wandb(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history in tensors, numbers and strings."""
        tables = ("swaps", "recalibrations")  # the others are made anew
        return {
            "metrics": self._recorder.state_dict(),
            "tables": {name: list(self.history.tables[name].rows) for name in tables},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; after ``start``."""
        self._recorder.load_state_dict(state["metrics"])
        for name, rows in state["tables"].items():
            self.history.tables[name].rows = [tuple(row) for row in rows]
        self._kinds = {str(row["layer"]): str(row["after"]) for row in self.history.tables["swaps"].records()}
        self._estimation = {
            str(row["layer"]): float(row["mean_shift"])
            for row in self.history.tables["recalibrations"].records()
            if row["mean_shift"] is not None
        }

    def _fill(self, trainer: Trainer, monitor: Monitor, snapshot: Snapshot | None) -> None:
        alarms = self.history.tables["alarms"]
        alarms.rows = []
        for alarm in monitor.alarms:
            alarms.add(**alarm._asdict())
        if snapshot is not None:
            self.history.tables["layers"] = layer_table(
                snapshot,
                monitor.layers,
                estimation_shift=self._estimation,
                dropout_shift=monitor.dropout_shift,
                alarms=[alarm.layer for alarm in monitor.alarms],
            )
        self.history.info |= {"steps": str(step_of(trainer)), "epochs": str(trainer.current_epoch)}

    def _tell_wandb(self, trainer: Trainer) -> None:
        for logger in _wandb(trainer):
            from bnkit.dashboard.wandb_run import log_history

            log_history(logger.experiment, self.history, step_of(trainer), prefix=logger._prefix)

    def _write(self) -> None:
        if self._folder is None:
            return
        from bnkit.dashboard.report import write_report  # plotly takes a while to import: only where it is used

        self._folder.mkdir(parents=True, exist_ok=True)
        self.history.save(self._folder)
        write_report(self.history, self._folder / PAGE)


def _wandb(trainer: Trainer) -> Iterator[WandbLogger]:
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def _recalibrations(trainer: Trainer) -> Iterator[BatchNormRecalibration]:
    return (callback for callback in trainer.callbacks if isinstance(callback, BatchNormRecalibration))  # type: ignore[attr-defined]
