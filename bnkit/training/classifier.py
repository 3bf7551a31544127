"""The reference job's LightningModule: image classification by cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from bnkit.training.images import Batch


class ImageClassifier(LightningModule):
    """Trains ``network`` by cross-entropy and measures its accuracy.

    Logged: ``train/loss`` and ``train/accuracy``, ``val/loss`` and ``val/accuracy``, ``test/loss`` and
    ``test/accuracy``. Accuracy is the fraction of all images that are classified right, over all devices.

    Args:
        network: Maps images ``(samples, channels, height, width)`` to logits ``(samples, num_classes)``.
        num_classes: Classes to tell apart.
        optimizer: Called with the parameters; in a config, an optimizer with ``_partial_: true``.
        scheduler: Called with the optimizer, stepped after each epoch; ``None``: constant learning rate.

    The checkpoint holds no objects of these, only tensors and numbers: it loads with ``weights_only=True``, into a
    module built again from the config.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("num_classes")
        self.network = network
        self._optimizer = optimizer
        self._scheduler = scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(samples, num_classes)`` of ``images``."""
        return cast("torch.Tensor", self.network(images))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002 - Lightning's signature
        """Return the mean cross-entropy of the batch, and log."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the batch's loss and accuracy."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the batch's loss and accuracy."""
        self._step(batch, "test", self.test_accuracy)

    def _step(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> torch.Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        evaluating = stage != "train"
        # a training loss a step; a mean over the epoch, weighted by the images in a batch and over devices, otherwise
        self.log(
            f"{stage}/loss",
            loss,
            on_step=not evaluating,
            on_epoch=evaluating,
            sync_dist=evaluating,
            batch_size=len(labels),
        )
        self.log(
            f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(labels)
        )
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the scheduler if there is one."""
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        return [optimizer], [self._scheduler(optimizer)]
