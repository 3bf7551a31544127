"""BatchNormAdaptation: test and predict by the statistics of the data met after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from bnkit.callbacks.evaluation_data import EvaluationData, loader_names
from bnkit.callbacks.order import run_before_other_callbacks
from bnkit.callbacks.own_forward import own_forward
from bnkit.callbacks.strategies import refuse_sharding
from bnkit.feeding import Forward
from bnkit.layers import batch_norm_layers, tracks_statistics
from bnkit.norms import Variant
from bnkit.preservation import undoing
from bnkit.recalibration import check_arguments, recalibrate
from bnkit.report import RecalibrationReport
from bnkit.running import Statistics, read_statistics, write_statistics

__all__ = ["BatchNormAdaptation"]


class BatchNormAdaptation(Callback):
    r"""Adapts the running statistics to the data that ``trainer.test``, ``predict`` and ``validate`` are given.

    Data from another source, sensor or weather move the activations away from the statistics of the training data.
    Before the first batch of each data loader, a pass over that loader's inputs measures the statistics of the target;
    mean and variance of each layer become

    $$\frac{N}{N+n} s_{source} + \frac{n}{N+n} s_{target}$$

    with N = ``prior_samples`` and n the samples seen (Schneider et al. 2020, "Improving robustness against common
    corruptions by covariate shift adaptation", section 3; there n is a batch, here all that the loader has, up to
    ``max_samples``). No label is used and no weight changes. Each loader is adapted to from the source statistics, and
    these are back, bit for bit, before the next loader and at the end, also after an exception or Ctrl-C. In ``fit`` it
    does nothing, nor in the validations there.

    The pass has a loader of its own over the same data set, sends batches through the transfer hooks and the precision
    context, and runs ``LightningModule.forward``. Several processes pool what they see and get the same statistics;
    each of them must have a batch of every loader. ``Frozen`` and ``Group`` layers, and layers without running
    statistics, are left as they are and named in ``report.kept``.

    In ``test`` and ``validate`` it logs, for each loader, ``bn/adaptation_shift_median`` and
    ``bn/adaptation_shift_worst`` (how far the running means moved, by layer, in running standard deviations) and
    ``bn/adaptation_samples``. Lightning allows no logging in ``predict``.

    Warning:
        What is measured is the shift *and* the classes in the loader: where it has other classes than the training
        data, or one class alone, the error rises. ``docs/adaptation.md`` says how much.

    Args:
        prior_samples: N, how many samples the source statistics are worth. 0, the target's alone, was best or as good
            on shifted data, with 32 samples too; more is a guard for very few samples that may not be shifted at all.
        max_samples: at most this many samples of each loader, over all ranks; None: all.
        consistency: what the layers upstream normalise by meanwhile, see [`bnkit.recalibrate`][]. ``"batch"``: the
            batch; one pass. ``"population"``: their adapted statistics; one pass a layer, and the one to take for
            batches of a few samples. None: ``"population"`` with ``prior_samples``, since in a single pass no layer
            meets the mixed statistics of those before it, else ``"batch"``.
        tolerance, on_nonfinite, progress: see [`bnkit.recalibrate`][].
        dataloaders: positions of the loaders to adapt to, or their names where they come in a dict; None: all.
        forward: how to run the module on a batch; default: its ``forward`` on a tensor, the first item of a tuple or
            list, or a dict as keyword arguments.

    Attributes:
        reports: a [`bnkit.RecalibrationReport`][] for each loader that the last call adapted to, by position or name.
            It stays in the processes that a strategy such as ``ddp_spawn`` starts.

    Raises:
        ValueError: an argument out of its range, or a loader in ``dataloaders`` that the trainer does not have.
        MisconfigurationException: in validate, test and predict, with a strategy that shards parameters (FSDP,
            DeepSpeed, model parallel), with a second callback of this kind, or with data that cannot be read without
            taking them away from the trainer, such as a stream that can be read once.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormAdaptation(max_samples=None)], logger=False)
    """

    def __init__(
        self,
        *,
        prior_samples: float = 0,
        max_samples: int | None = 10_000,
        tolerance: float | None = None,
        consistency: Literal["batch", "population"] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        dataloaders: Sequence[int | str] | None = None,
        forward: Forward | None = None,
        progress: bool = False,
    ) -> None:
        if consistency is None:
            consistency = "population" if prior_samples else "batch"
        check_arguments(max_samples, tolerance, prior_samples, consistency, on_nonfinite)
        if isinstance(dataloaders, str):
            raise ValueError(f"dataloaders must be a list of names or positions, such as [{dataloaders!r}].")
        self.dataloaders = None if dataloaders is None else list(dataloaders)
        self.reports: dict[int | str, RecalibrationReport] = {}
        self._forward = forward
        self._options: dict[str, Any] = {
            "max_samples": max_samples,
            "tolerance": tolerance,
            "prior_samples": prior_samples,
            "consistency": consistency,
            "on_nonfinite": on_nonfinite,
            "progress": progress,
        }
        self._names: list[int | str] = []
        self._current: int | None = None
        self._source: Statistics | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and run first: the source statistics must be back before other callbacks swap weights."""
        if stage == TrainerFn.FITTING:
            return
        refuse_sharding(self, trainer)
        if sum(isinstance(callback, BatchNormAdaptation) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "The trainer has two BatchNormAdaptation callbacks, which would adapt to each other: keep one."
            )
        holders = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        if trainer.world_size > 1 and any(
            getattr(holder, "allow_zero_length_dataloader_with_multiple_devices", False) for holder in holders
        ):
            raise MisconfigurationException(
                "BatchNormAdaptation pools what all ranks see, and one without batches would keep the others waiting: "
                "set allow_zero_length_dataloader_with_multiple_devices to False."
            )
        run_before_other_callbacks(self, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the loaders and whether there is anything to do."""
        self._names, self._current = [], None
        if trainer.state.fn == TrainerFn.FITTING:
            return
        self.reports = {}
        names = loader_names(trainer)
        unknown = [name for name in self.dataloaders or () if name not in names]
        if unknown:
            raise ValueError(f"dataloaders={unknown} names no loaders of the trainer: it has {names}.")
        if any(_adapts(layer) for layer in batch_norm_layers(pl_module).values()):
            self._names = names
        else:
            rank_zero_warn(
                f"BatchNormAdaptation has nothing to do: {type(pl_module).__name__} has no BatchNorm layers that "
                "track running statistics, beside those that are held (Frozen, Group)."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adapt before a loader's first batch: after every callback and the module have put their weights in place."""
        if not self._names or dataloader_idx == self._current:
            return
        self._restore(pl_module)
        self._current = dataloader_idx
        name = self._names[dataloader_idx]
        if self.dataloaders is None or name in self.dataloaders:
            self._adapt(trainer, pl_module, dataloader_idx, name)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the source statistics back."""
        self._restore(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the source statistics back."""
        self._restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the source statistics back, wherever the end came from."""
        self._restore(pl_module)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, index: int, name: int | str) -> None:
        data = EvaluationData(trainer, pl_module, index)
        self._source = read_statistics(pl_module)  # kept before anything changes: Ctrl-C may come right after
        report = recalibrate(pl_module, data, forward=own_forward(trainer, self._forward), **self._options)
        self.reports[name] = report
        if trainer.state.fn != TrainerFn.PREDICTING and not trainer.barebones:
            values = {
                "bn/adaptation_shift_median": report.median_shift,
                "bn/adaptation_shift_worst": report.worst.shift if report.worst else float("nan"),
                "bn/adaptation_samples": float(report.samples),
            }
            # Once a loader, so the mean over its epoch is the value; it is the same on all ranks.
            pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._source is None:
            return
        source = self._source
        with undoing(lambda: write_statistics(pl_module, source)):
            pass
        self._source = None


def _adapts(layer: nn.Module) -> bool:
    return tracks_statistics(layer) and not (isinstance(layer, Variant) and layer.holds_statistics)  # type: ignore[arg-type]
