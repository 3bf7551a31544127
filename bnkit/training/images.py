"""What the reference job's data sets share: a fixed split, normalisation and loaders of images held in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

Batch = tuple[torch.Tensor, torch.Tensor]


class ImageDataset(Dataset[Batch]):
    """Images and labels in memory that a loader fetches a batch at a time, not an image at a time.

    Args:
        images: Float images, ``(samples, channels, height, width)``.
        labels: Class indices, ``(samples,)``.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of ``indices``; torch's loader calls it in place of one ``__getitem__`` per image."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def _as_fetched(batch: Any) -> Any:
    """Collate nothing: ``ImageDataset.__getitems__`` returns whole batches."""
    return batch


class ImageData(LightningDataModule, ABC):
    """Images of one task, split once and for all into training, validation and test.

    The split depends on ``split_seed`` alone, never on the seed of a run: results of different seeds are comparable,
    and no test image is ever seen in training.

    Args:
        batch_size: Images in a training batch, on each device: the batch that BatchNorm normalises over.
        eval_batch_size: Images in a validation or test batch, on each device; results do not depend on it.
        validation_size: Images set aside for validation, with the classes in equal shares.
        train_size: Train on this many images of the training split; ``None``: on all.
        split_seed: Seed of the split.
        num_workers: Worker processes a loader. The images are in memory: 0 is fastest for small images.

    Raises:
        ValueError: When a size is not a positive number, or ``num_workers`` is negative.
    """

    num_classes: ClassVar[int]
    image_shape: ClassVar[tuple[int, int, int]]
    """Channels, height and width."""
    mean: ClassVar[float]
    std: ClassVar[float]
    """Mean and standard deviation of the pixels, as fractions of white, over all training images."""

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int = 256,
        validation_size: int,
        train_size: int | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("validation_size", validation_size),
            ("train_size", train_size),
        ):
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise ValueError(f"data.{name} is {size!r}; it must be a whole number of at least 1.")
        if not (isinstance(num_workers, int) and num_workers >= 0):
            raise ValueError(f"data.num_workers is {num_workers!r}; it must be 0 (load in the main process) or more.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_size = validation_size
        self.train_size = train_size
        self.split_seed = split_seed
        self.num_workers = num_workers
        self._splits: dict[str, ImageDataset] = {}

    @abstractmethod
    def read(self) -> tuple[Batch, Batch | None]:
        """Return ``(images, labels)`` for training and for test, images as uint8 or float fractions of white.

        Where the data set has no test images of its own, the second is ``None``: the test set is split off the first.
        """

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - Lightning's signature; one reading serves all
        """Read the images and split them, once."""
        if self._splits:
            return
        (images, labels), test = self.read()
        rest = torch.arange(len(labels))
        if test is None:
            rest, held_out = self._split(rest, labels, self.validation_size, "test images")
            test = images[held_out], labels[held_out]
        train, validation = self._split(rest, labels, self.validation_size, "validation_size")
        if self.train_size is not None and self.train_size > len(train):
            raise ValueError(
                f"data.train_size is {self.train_size}, but the training split has {len(train)} images; "
                f"lower it, or leave it null for all."
            )
        train = train[: self.train_size]
        self._splits = {
            "train": self._dataset(images[train], labels[train]),
            "validation": self._dataset(images[validation], labels[validation]),
            "test": self._dataset(*test),
        }

    def _split(
        self, indices: torch.Tensor, labels: torch.Tensor, size: int, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shuffle ``indices`` and set ``size`` of them aside, each class in its share."""
        if size > len(indices) - self.num_classes or size < self.num_classes:
            raise ValueError(
                f"{name} is {size}, but it must leave at least one image of each of the {self.num_classes} classes on "
                f"both sides of a split of {len(indices)} images; set data.validation_size in between."
            )
        kept, aside = train_test_split(
            indices.numpy(), test_size=size, stratify=labels[indices].numpy(), random_state=self.split_seed
        )
        return torch.from_numpy(kept), torch.from_numpy(aside)

    def _dataset(self, images: torch.Tensor, labels: torch.Tensor) -> ImageDataset:
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        return ImageDataset((images.float() / scale - self.mean) / self.std, labels.long())

    def split(self, name: str) -> ImageDataset:
        """Return the data set of the split ``name``: ``"train"``, ``"validation"`` or ``"test"``."""
        self.setup()
        return self._splits[name]

    def _loader(self, name: str, batch_size: int, *, train: bool) -> DataLoader[Batch]:
        dataset = self.split(name)
        if train and len(dataset) < batch_size:
            raise ValueError(
                f"data.batch_size is {batch_size}, but the training split has {len(dataset)} images; lower it."
            )
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=train,
            drop_last=train,  # a rest of one image cannot be normalised over the batch
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches, the last one dropped where it is smaller."""
        return self._loader("train", self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches, in order."""
        return self._loader("validation", self.eval_batch_size, train=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches, in order."""
        return self._loader("test", self.eval_batch_size, train=False)
