"""Fashion-MNIST from four IDX files in a directory."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bnkit.training.idx import read_idx
from bnkit.training.images import Batch, ImageData

if TYPE_CHECKING:
    import torch

# SHA-256 of each file's uncompressed content. It is the content of the files whose MD5 the authors publish in their
# README: distributions compress it again, so that only the content is the same everywhere.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


class FashionMNIST(ImageData):
    """70,000 photographs of clothes, 28 x 28 pixels in ten classes: 60,000 to train on, 10,000 for test.

    Args:
        directory: Where the four IDX files are, compressed (``.gz``) or plain. Debian's package
            ``dataset-fashion-mnist`` installs them in ``/usr/share/datasets/fashion-mnist``.
        download: Get the files that are missing from the authors' server, into ``directory``.
        batch_size: Images in a training batch, on each device.
        eval_batch_size: Images in a validation or test batch, on each device.
        validation_size: Training images set aside for validation, with the classes in equal shares.
        train_size: Train on this many images of the training split; ``None``: on all.
        split_seed: Seed of the split.
        num_workers: Worker processes a loader.

    Raises:
        FileNotFoundError: In ``prepare_data``, when files are missing and ``download`` is false.
        ConnectionError: In ``prepare_data``, when a download fails.
        ValueError: When a file's content is not Fashion-MNIST's.

    Source:
        Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
        2017, arXiv:1708.07747. MIT licence.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    mean: ClassVar[float] = 0.2860
    std: ClassVar[float] = 0.3530

    def __init__(
        self,
        *,
        directory: str | os.PathLike[str],
        download: bool = False,
        batch_size: int,
        eval_batch_size: int = 256,
        validation_size: int = 5_000,
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
        self.directory = Path(directory).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Make sure that the four files are there, once a machine; see the class for the errors."""
        missing = [name for name in CHECKSUMS if self._find(name) is None]
        if missing and not self.download:
            raise FileNotFoundError(
                f"Fashion-MNIST is not in {self.directory} (no {', '.join(missing)}, plain or .gz): install Debian's "
                f"package dataset-fashion-mnist (it puts the files into /usr/share/datasets/fashion-mnist), or set "
                f"data.directory to where they are, or data.download=true together with a writable data.directory."
            )
        for name in missing:
            self._download(name)

    def read(self) -> tuple[Batch, Batch]:
        """Return the 60,000 training and the 10,000 test images, ``(samples, 1, 28, 28)`` in uint8, with labels."""
        self.prepare_data()
        train, test = (
            (self._array(f"{part}-images-idx3-ubyte").unsqueeze(1), self._array(f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        )
        return train, test

    def _array(self, name: str) -> torch.Tensor:
        path = self._find(name)
        assert path is not None
        return read_idx(path, sha256=CHECKSUMS[name])

    def _find(self, name: str) -> Path | None:
        """Return the file ``name``, compressed or plain, if it is there."""
        candidates = (self.directory / f"{name}.gz", self.directory / name)
        return next((path for path in candidates if path.is_file()), None)

    def _download(self, name: str) -> None:
        """Get one file; nothing stands under its name before it is whole and its checksum is right."""
        url = f"{URL}/{name}.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
                part = Path(scratch, f"{name}.gz")
                with urllib.request.urlopen(url, timeout=30) as source, part.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                read_idx(part, sha256=CHECKSUMS[name])
                part.replace(self.directory / part.name)
        except PermissionError as error:
            raise PermissionError(
                f"Cannot write Fashion-MNIST into {self.directory}; set data.directory to a folder of yours."
            ) from error
        except OSError as error:  # URLError, timeouts and resets are all of them OSErrors
            raise ConnectionError(
                f"Could not download {url} ({error}); connect this machine to the network, or put the four files into "
                f"{self.directory} yourself."
            ) from error
