"""BatchNormRecalibration: validate, and save, by the statistics of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from bnkit.callbacks.order import run_after_other_callbacks
from bnkit.callbacks.own_forward import own_forward
from bnkit.callbacks.strategies import refuse_sharding
from bnkit.callbacks.training_data import TrainingData
from bnkit.feeding import Forward
from bnkit.layers import batch_norm_layers, tracks_statistics
from bnkit.norms import Variant
from bnkit.recalibration import check_arguments, recalibrate
from bnkit.report import RecalibrationReport

try:
    from lightning.pytorch.callbacks import WeightAveraging

    _AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging, WeightAveraging)
except ImportError:  # Lightning before 2.6
    _AVERAGING = (StochasticWeightAveraging,)

__all__ = ["BatchNormRecalibration"]


class BatchNormRecalibration(Callback):
    """Recalibrates the running statistics before each validation in fit, and at the end of fit.

    The model is validated, and until the next training step saved, with the statistics of the training data under the
    weights that it has then, averaged weights included (``WeightAveraging``, ``EMAWeightAveraging``,
    ``StochasticWeightAveraging``); the order in which the callbacks are listed does not matter. The trained weights are
    bit-identical to those without the callback: running statistics take no part in a training step. Variants in whose
    training they do (``Renorm``, ``MovingAverage``) and frozen layers are left alone, and named in ``report.kept``.

    The pass over the training data is its own: it builds new loaders over the same data sets, sends batches through
    the transfer hooks and the precision context, and runs ``LightningModule.forward``. The sanity check, ``validate``
    and ``test`` recalibrate nothing: a checkpoint brings its statistics along. It logs
    ``bn/recalibration_shift_median`` and ``bn/recalibration_shift_worst`` (how far the running means were off, by
    layer, in running standard deviations), ``bn/recalibration_samples`` and ``bn/recalibration_seconds``.

    Args:
        every_n_epochs: recalibrate in the validations of every n-th epoch; 0: before none.
        every_n_steps: instead, recalibrate in validations at least n optimizer steps after the last recalibration.
        at_fit_end: recalibrate when training ends too, if weights or statistics may have changed since the last time.
        dataloader: a loader, or a function that returns one, to use instead of the training data, say without
            augmentation. It is rebuilt as the training loader would be; under DDP every rank takes its share.
        forward: how to run the module on a batch; default: its ``forward`` on a tensor, the first item of a tuple or
            list, or a dict as keyword arguments.
        max_samples, tolerance, prior_samples, consistency, on_nonfinite, progress: see [`bnkit.recalibrate`][].

    Attributes:
        report: the [`bnkit.RecalibrationReport`][] of the last recalibration; None before the first.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in fit, with a strategy that shards parameters (FSDP, DeepSpeed, model parallel), or
            training data that is no DataLoader and cannot be read without disturbing training.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormRecalibration(max_samples=20_000)], logger=False)
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        at_fit_end: bool = True,
        dataloader: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        forward: Forward | None = None,
        max_samples: int | None = 10_000,
        tolerance: float | None = None,
        prior_samples: float = 0,
        consistency: Literal["batch", "population"] = "batch",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> None:
        check_arguments(max_samples, tolerance, prior_samples, consistency, on_nonfinite)
        if every_n_epochs < 0:
            raise ValueError(f"every_n_epochs must be 0 (never) or more, but is {every_n_epochs!r}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, but is {every_n_steps!r}.")
        if every_n_epochs == 0 and every_n_steps is None and not at_fit_end:
            raise ValueError("every_n_epochs=0 with at_fit_end=False would never recalibrate: leave the callback out.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_fit_end = at_fit_end
        self.report: RecalibrationReport | None = None
        self._dataloader = dataloader
        self._forward = forward
        self._options: dict[str, Any] = {
            "max_samples": max_samples,
            "tolerance": tolerance,
            "prior_samples": prior_samples,
            "consistency": consistency,
            "on_nonfinite": on_nonfinite,
            "progress": progress,
        }
        self._last_step = 0
        self._is_current = False
        self._warned = False
        self._due = False
        self._layers: dict[str, _BatchNorm] = {}
        self._frozen: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and see to it that averaged weights are in place when this callback runs."""
        if stage != "fit":
            return
        refuse_sharding(self, trainer)
        run_after_other_callbacks(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is nothing to do."""
        self._is_current = False
        if not self._layers_to_recalibrate(pl_module):
            rank_zero_warn(
                f"BatchNormRecalibration has nothing to do: {type(pl_module).__name__} has no BatchNorm layers that "
                "track running statistics, beside those that training normalises by (Frozen, Renorm, MovingAverage)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that the training data can be read."""
        self._last_step = min(self._last_step, trainer.global_step)  # an earlier fit may have gone on for longer
        if self._layers_to_recalibrate(pl_module):
            TrainingData(trainer, pl_module, self._dataloader).check()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the layers once, not after every batch."""
        self._layers = batch_norm_layers(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note which layers training holds frozen: in a validation all of them are in evaluation mode."""
        self._frozen = {name for name, layer in self._layers.items() if not layer.training}
        self._is_current = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is one to recalibrate before."""
        self._due = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._is_time(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Recalibrate before the first batch: after every callback and the module have put their weights in place."""
        if self._due:
            self._due = False
            self._recalibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if weights were averaged once more after they were validated, and will be saved so."""
        if self._is_current and not self._warned and _averaged_at_epoch_end(trainer):
            self._warned = True
            rank_zero_warn(
                "The averaged weights were updated at the end of the epoch, after they had been recalibrated and "
                "validated: a checkpoint saved now holds weights and statistics that were not validated. Update them "
                "by steps, or use ModelCheckpoint(save_on_train_epoch_end=False)."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the final weights, which an averaging callback may have just put in place."""
        averaged = any(isinstance(callback, _AVERAGING) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.at_fit_end and (averaged or not self._is_current):
            self._recalibrate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Where ``every_n_steps`` counts from."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore where ``every_n_steps`` counts from."""
        self._last_step = state_dict["last_step"]

    @staticmethod
    def _layers_to_recalibrate(pl_module: LightningModule) -> list[str]:
        return [
            name
            for name, layer in batch_norm_layers(pl_module).items()
            if tracks_statistics(layer)
            and not (isinstance(layer, Variant) and (layer.holds_statistics or layer.trains_by_statistics))
        ]

    def _to_keep(self, pl_module: LightningModule) -> set[str]:
        """What training holds frozen, and what it normalises by: that would change the training."""
        layers = batch_norm_layers(pl_module)
        used = {name for name, layer in layers.items() if isinstance(layer, Variant) and layer.trains_by_statistics}
        return (self._frozen & layers.keys()) | used

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_steps is not None:
            return trainer.global_step - self._last_step >= self.every_n_steps
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layers_to_recalibrate(pl_module):
            return  # on_fit_start has said so

        self.report = recalibrate(
            pl_module,
            TrainingData(trainer, pl_module, self._dataloader),
            forward=own_forward(trainer, self._forward),
            frozen=self._to_keep(pl_module),
            **self._options,
        )
        self._last_step = trainer.global_step
        self._is_current = True
        self._log(trainer, self.report)

    @staticmethod
    def scalars(report: RecalibrationReport) -> dict[str, float]:
        """What is logged of a recalibration."""
        return {
            "bn/recalibration_shift_median": report.median_shift,
            "bn/recalibration_shift_worst": report.worst.shift if report.worst else float("nan"),
            "bn/recalibration_samples": float(report.samples),
            "bn/recalibration_seconds": report.seconds,
        }

    def _log(self, trainer: Trainer, report: RecalibrationReport) -> None:
        for logger in trainer.loggers:
            # Lightning's own x axis, which with several optimizers is not the global step.
            logger.log_metrics(self.scalars(report), step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _averaged_at_epoch_end(trainer: Trainer) -> bool:
    """Whether a WeightAveraging callback has updated its average since the last batch of the epoch."""
    return any(
        getattr(callback, "_latest_update_epoch", None) == trainer.current_epoch
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, _AVERAGING) and not isinstance(callback, StochasticWeightAveraging)
    )
