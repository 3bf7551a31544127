"""ActivationShiftMonitor: every layer's activation shift, in any logger, in W&B, on a page and in the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from bnkit.callbacks.overhead import Overhead
from bnkit.callbacks.run_record import RunRecord, step_of
from bnkit.callbacks.shift_probes import ShiftProbes, is_compiled
from bnkit.callbacks.strategies import refuse_sharding
from bnkit.dashboard.scalars import snapshot_scalars
from bnkit.feeding import Forward, known_samples_in
from bnkit.layers import batch_norm_layers
from bnkit.monitoring import Monitor, check_arguments
from bnkit.monitoring.snapshot import Snapshot

__all__ = ["ActivationShiftMonitor"]

log = logging.getLogger(__name__)

_TOLD = 10
"""So many alarms are told in the terminal as they come; the page has all."""


class ActivationShiftMonitor(Callback):
    """Watches every BatchNorm layer at every training step, at a cost of well below one per cent of the step.

    Three questions are kept apart: *noise* (this batch against the running statistics), *drift* (where the activations
    are going: a fast against a slow average) and *estimation shift* (running statistics against the population, known
    after each recalibration by [`bnkit.callbacks.BatchNormRecalibration`][]). Each layer is compared with its own past,
    and an alarm names layer, cause and cure. Training is bit-identical to training without the callback. What cannot be
    known of a layer is reported as unknown. See [`bnkit.Monitor`][] for how, and [`bnkit.dashboard.keys`][] for what is
    logged: ``bn/…`` for the model and ``bn_shift/<layer>`` and so on for each layer, of the worst layers alone where
    there are more than 100.

    It logs to every logger of the trainer, tells alarms as warnings of Python's ``logging``, prints the worst layers at
    the end of fit, and leaves ``report.html``, a page that needs no network, in the run directory. A W&B run also gets
    the metrics' definitions, a heatmap of layers and steps and tables.

    With several ranks the numbers are those of rank 0 (exact for its batches, and for all ranks' where BatchNorm is
    synchronized), or with ``across_ranks`` the average of all ranks.

    Args:
        every_n_steps: training batches from one log to the next; every batch counts, whatever this is.
        gap_every_n_steps: measure the train-eval gap (the same batch and weights, by batch and by running statistics)
            every n batches, at the price of two forwards without gradient; 0: never.
        covariate_shift_every_n_steps: measure the internal covariate shift (Santurkar et al. 2018) of up to eight
            layers every n optimizer steps, at the price of up to nine backward passes; 0: never.
        input_every_n_steps: reduce the input of layers that compute no batch statistics (frozen ones) every n batches.
        false_alarms_per_1000_steps, window, noise_level, across_ranks: see [`bnkit.Monitor`][].
        forward: how to run the module on a batch, for the gap and the covariate shift; default: its ``forward`` on a
            tensor, the first item of a tuple or list, or a dict as keyword arguments.
        loss: a function of output and batch, for both; default: cross-entropy or mean squared error where the second
            item of the batch fits the output.
        report: whether to write the page.
        report_dir: where to; default: the directory of the trainer's first logger, and no page where there is none.

    Attributes:
        monitor: the [`bnkit.Monitor`][], during and after fit.
        snapshot: the last [`bnkit.monitoring.Snapshot`][]; None before the first.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in fit, with a strategy that shards parameters (FSDP, DeepSpeed, model parallel).

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationShiftMonitor()], logger=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        gap_every_n_steps: int = 200,
        covariate_shift_every_n_steps: int = 0,
        input_every_n_steps: int = 20,
        false_alarms_per_1000_steps: float = 0.1,
        window: int = 100,
        noise_level: float = 0.1,
        across_ranks: bool = False,
        forward: Forward | None = None,
        loss: Callable[[Any, Any], Any] | None = None,  # not Tensor: LightningCLI would ask for the annotation
        report: bool = True,
        report_dir: str | Path | None = None,
    ) -> None:
        check_arguments(every_n_steps, input_every_n_steps, false_alarms_per_1000_steps, window, noise_level)
        self.monitor: Monitor | None = None
        self.snapshot: Snapshot | None = None
        self._options: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "input_every_n_steps": input_every_n_steps,
            "false_alarms_per_1000_steps": false_alarms_per_1000_steps,
            "window": window,
            "noise_level": noise_level,
            "across_ranks": across_ranks,
        }
        self._probes = ShiftProbes(gap_every_n_steps, covariate_shift_every_n_steps, forward, loss)
        self._record = RunRecord(report, report_dir)
        self._across_ranks = across_ranks
        self._restored: dict[str, Any] = {}
        self._told = 0
        self._clock = Overhead()
        self._pre_forward: Any = None
        self._step_begins = False
        self._look_again = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and forget an earlier fit; a checkpoint is loaded after this."""
        if stage != "fit":
            return
        refuse_sharding(self, trainer)
        self._stop()
        self.monitor, self.snapshot, self._restored = None, None, {}
        self._told, self._clock = 0, Overhead()
        self._probes.stop()
        if stage == "fit":
            self._record.prepare(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch the layers; the module is built, swapped, wrapped and its weights are loaded."""
        layers = batch_norm_layers(pl_module)
        if not layers:
            rank_zero_warn(
                f"ActivationShiftMonitor has nothing to watch: {type(pl_module).__name__} has no BatchNorm layers."
            )
            return
        compiled = is_compiled(pl_module)
        across = self._across_ranks and trainer.world_size > 1
        if across and compiled and trainer.model is not pl_module:
            across = False
            rank_zero_warn(
                "ActivationShiftMonitor watches rank 0 alone: in a compiled module it cannot tell when "
                "DistributedDataParallel broadcasts the buffers of rank 0 to the others."
            )
        self._record.start(trainer, pl_module, layers)
        self._probes.start(every_rank=across)
        if not (trainer.is_global_zero or across):
            return
        options = self._options | {"across_ranks": across} | ({"input_every_n_steps": None} if compiled else {})
        self.monitor = Monitor(pl_module, **options)
        if self._restored:
            self.monitor.load_state_dict(self._restored["monitor"])
            self._record.load_state_dict(self._restored["record"])
            self._told = len(self.monitor.alarms)
            self._restored = {}
        if across and trainer.model is not pl_module:
            # DistributedDataParallel broadcasts rank 0's buffers at the start of its forward: look at them after that.
            self._pre_forward = pl_module.register_forward_pre_hook(lambda *_: self._before())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Some layers may be frozen, unfrozen or swapped, by callbacks and hooks that run after this one."""
        self._look_again = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the probes that are due, and look at the running statistics before the step."""
        if self.monitor is not None and self._look_again:
            self.monitor.refresh()
            self._record.look_at_kinds(trainer)
        self._look_again = False
        self._record.log(trainer, self._probes.before(trainer, pl_module, batch, self.monitor))
        self._clock.start()
        self._step_begins = True
        self._before()
        self._step_begins = trainer.model is not pl_module

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at them after the step; log, every so often."""
        self._step_begins = False
        if self.monitor is not None:
            snapshot = self.monitor.after(step_of(trainer), known_samples_in(batch))
            self._clock.stop()
            if snapshot is not None:
                self._log(trainer, snapshot)
                self._look_again = True
        self._record.log(trainer, self._probes.after(trainer, pl_module, self.monitor, self._record.names))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was validated, and what a recalibration before it found."""
        if not trainer.sanity_checking:
            self._record.measured(trainer)
            self._record.recalibrated(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what the module has logged in the epoch's steps; its own hook of this name runs after this one."""
        self._record.measured(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the steps since the last log."""
        self._log_the_rest(trainer)
        self._stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, tell W&B, and print the worst layers."""
        if self.monitor is not None:
            self._record.recalibrated(trainer)
            self._record.finish(trainer, self.monitor, self.snapshot)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and the page as far as it is known."""
        self._stop()
        if self.monitor is not None and self._record.is_open:
            if not self.monitor.across_ranks:  # then all ranks would have to take part, and this one may be alone
                with suppress(Exception):
                    self._log_the_rest(trainer)
            self._record.abandon(trainer, self.monitor, self.snapshot, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """What was learnt of the layers, the alarms, and the run so far, so that a resumed run goes on."""
        if self.monitor is None:
            return self._restored
        return {"monitor": self.monitor.state_dict(), "record": self._record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._restored = state_dict

    # ------------------------------------------------------------------ how

    def _before(self) -> None:
        """As the step's forward begins; a module may be called several times in a step."""
        if self.monitor is not None and self._step_begins:
            self._step_begins = False
            self.monitor.before()

    def _log(self, trainer: Trainer, snapshot: Snapshot, *, overhead: bool = True) -> None:
        assert self.monitor is not None
        began = time.process_time()
        self.snapshot = snapshot
        scalars = snapshot_scalars(snapshot, self.monitor.layers, self._record.names, len(self.monitor.alarms))
        if overhead:
            scalars["bn/monitor_overhead"] = self._clock.share(self.monitor.seconds)
        self._record.log(trainer, scalars)
        for alarm in self.monitor.alarms[self._told : _TOLD]:
            if trainer.is_global_zero:
                log.warning("%s", alarm.message)
        self._told = len(self.monitor.alarms)
        self._clock.logging += time.process_time() - began

    def _log_the_rest(self, trainer: Trainer) -> None:
        snapshot = None if self.monitor is None else self.monitor.snapshot()
        if snapshot is not None:
            self._log(trainer, snapshot, overhead=False)  # for a few steps, whose share says little

    def _stop(self) -> None:
        """Leave no hook behind."""
        self._step_begins = False
        if self._pre_forward is not None:
            self._pre_forward.remove()
            self._pre_forward = None
        if self.monitor is not None:
            self.monitor.close()
