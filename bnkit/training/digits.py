"""Handwritten digits that come with scikit-learn: real data that needs no download."""

from __future__ import annotations

from typing import ClassVar

import torch
from sklearn.datasets import load_digits

from bnkit.training.images import Batch, ImageData


class Digits(ImageData):
    """1,797 handwritten digits of 8 x 8 pixels in ten classes, installed with scikit-learn.

    Split, with the classes in equal shares: ``validation_size`` images each for validation and for test, the rest for
    training.

    Args:
        batch_size: Images in a training batch, on each device.
        eval_batch_size: Images in a validation or test batch, on each device.
        validation_size: Images for validation, and as many again for test.
        train_size: Train on this many images of the training split; ``None``: on all.
        split_seed: Seed of the split.
        num_workers: Worker processes a loader.

    Source:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998: the
        test part, which ``sklearn.datasets.load_digits`` copies.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[float] = 0.3053
    std: ClassVar[float] = 0.3760

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int = 256,
        validation_size: int = 360,
        train_size: int | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            validation_size=validation_size,
            train_size=train_size,
            split_seed=split_seed,
            num_workers=num_workers,
        )

    def read(self) -> tuple[Batch, None]:
        """Return all images ``(1797, 1, 8, 8)``, as fractions of white, and their labels; there is no test part."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, *self.image_shape) / 16  # ink counts of 0 to 16
        return (images, torch.from_numpy(labels)), None
