"""Validate by both statistics, side by side: those that training left behind and the recalibrated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torchmetrics.classification import MulticlassAccuracy

import bnkit
from bnkit.callbacks import BatchNormRecalibration

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from bnkit.training.images import Batch


class Comparison(NamedTuple):
    """One validation: accuracies are fractions of the same images."""

    epoch: int
    running_average: float
    recalibrated: float


class StatisticsComparison(Callback):
    """Validates every batch a second time, by the statistics that recalibration has just replaced.

    Logs ``val/accuracy_running_average`` beside the module's ``val/accuracy``, keeps one ``Comparison`` for each
    validation in ``rows``, prints it, and prints all as a table at the end of fit. It changes nothing: weights,
    statistics and random streams after a fit are those of a fit without it. It costs one more forward of the validation
    images.

    Without a [`bnkit.callbacks.BatchNormRecalibration`][] among the trainer's callbacks it says so and does nothing.
    A validation before which nothing was recalibrated has no row.

    Args:
        num_classes: Classes to tell apart, as in the module.
        metric: Key under which the module logs its own validation accuracy.
    """

    def __init__(self, *, num_classes: int, metric: str = "val/accuracy") -> None:
        self.metric = metric
        self.rows: list[Comparison] = []
        self._accuracy = MulticlassAccuracy(num_classes, average="micro")
        self._recalibration: BatchNormRecalibration | None = None
        self._replaced: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._seen: bnkit.RecalibrationReport | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Find the callback that recalibrates."""
        if stage != TrainerFn.FITTING:
            return
        found = [callback for callback in trainer.callbacks if isinstance(callback, BatchNormRecalibration)]  # type: ignore[attr-defined]
        self._recalibration = found[0] if found else None
        if self._recalibration is None:
            rank_zero_info(
                "StatisticsComparison has nothing to compare: the trainer has no BatchNormRecalibration callback."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forget the validation before."""
        self._accuracy.to(pl_module.device).reset()
        self._seen = self._recalibration.report if self._recalibration is not None else None
        self._replaced = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Forward the batch again by the replaced statistics; the recalibration took place before the first batch."""
        if not self._compares(trainer) or dataloader_idx != 0:
            return
        assert self._recalibration is not None
        report = self._recalibration.report
        if batch_idx == 0 and report is not None and report is not self._seen:
            self._replaced = report.before or None  # nothing to compare where no layer was recalibrated
        if self._replaced is None:
            return
        images, labels = batch
        with bnkit.running_statistics(pl_module, self._replaced), trainer.precision_plugin.forward_context():
            logits = pl_module(images)
        self._accuracy.update(logits, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy by the replaced statistics."""
        if self._compares(trainer) and self._replaced is not None:
            # already that of all devices: the metric gathers its counts itself
            accuracy = self._accuracy.compute()
            pl_module.log(f"{self.metric}_running_average", accuracy, prog_bar=True, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keep the row, and print it."""
        if not self._compares(trainer) or self._replaced is None:
            return
        metrics = trainer.callback_metrics
        running_average, recalibrated = (float(metrics[f"{self.metric}{end}"]) for end in ("_running_average", ""))
        self.rows.append(Comparison(trainer.current_epoch, running_average, recalibrated))
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            (print if bar is None else bar.print)(  # a bar knows how to stay below what is printed
                f"Epoch {trainer.current_epoch:3d}: validation accuracy {100 * running_average:.1f} % by the running "
                f"average, {100 * recalibrated:.1f} % recalibrated"
            )

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Print the table."""
        if self.rows:
            print(f"\nValidation accuracy in %, by the statistics that BatchNorm normalises with\n\n{self.table()}\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, so that the table of a resumed fit is whole."""
        return {"rows": [tuple(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the fit that is resumed."""
        self.rows = [Comparison(*row) for row in state_dict["rows"]]

    def table(self) -> str:
        """Return the rows as aligned text: accuracies in percent, their difference in percentage points."""
        lines = [
            f"{row.epoch:5d}  {100 * row.running_average:15.1f}  {100 * row.recalibrated:12.1f}  "
            f"{100 * (row.recalibrated - row.running_average):+10.1f}"
            for row in self.rows
        ]
        if len(self.rows) > 1:
            before = 100 * sum(row.running_average for row in self.rows) / len(self.rows)
            after = 100 * sum(row.recalibrated for row in self.rows) / len(self.rows)
            lines.append(f"{'mean':>5}  {before:15.1f}  {after:12.1f}  {after - before:+10.1f}")
        return "\n".join([f"{'epoch':>5}  {'running average':>15}  {'recalibrated':>12}  {'difference':>10}", *lines])

    def _compares(self, trainer: Trainer) -> bool:
        return self._recalibration is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
