from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest
import torch

from bnkit.training import FashionMNIST, fashion_mnist

INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.numpy().tobytes()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A small data set in the format of Fashion-MNIST, one file of it plain, with its own checksums."""
    generator = torch.Generator().manual_seed(0)
    checksums = {}
    for part, size in (("train", 200), ("t10k", 50)):
        arrays = {
            f"{part}-images-idx3-ubyte": torch.randint(256, (size, 28, 28), generator=generator).byte(),
            f"{part}-labels-idx1-ubyte": torch.arange(size).remainder(10).byte(),
        }
        for name, array in arrays.items():
            checksums[name] = hashlib.sha256(idx(array)).hexdigest()
            if name.startswith("t10k-labels"):
                (tmp_path / name).write_bytes(idx(array))
            else:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    monkeypatch.setattr(fashion_mnist, "CHECKSUMS", checksums)
    return tmp_path


def test_it_reads_compressed_and_plain_files_and_keeps_test_apart(directory):
    data = FashionMNIST(directory=directory, batch_size=8, validation_size=40)
    data.prepare_data()
    data.setup()
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [160, 40, 50]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 28, 28)
    assert labels.dtype == torch.int64
    white = (1 - data.mean) / data.std
    assert data.split("test").images.max() == pytest.approx(white)
    assert torch.bincount(data.split("validation").labels).tolist() == [4] * 10
    assert torch.equal(data.split("test").labels, torch.arange(50).remainder(10))


def test_missing_files_are_one_sentence_with_the_cures(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        FashionMNIST(directory=tmp_path, batch_size=8).prepare_data()
    message = str(error.value)
    assert str(tmp_path) in message
    assert "dataset-fashion-mnist" in message
    assert str(INSTALLED) in message
    assert "data.download=true" in message
    assert "\n" not in message


def test_a_damaged_file_is_named(directory):
    (directory / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01\0"))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz is damaged or another file"):
        FashionMNIST(directory=directory, batch_size=8, validation_size=40).setup()


def test_download_gets_what_is_missing_and_nothing_else(directory, tmp_path_factory, monkeypatch):
    server = tmp_path_factory.mktemp("server")
    name = "train-labels-idx1-ubyte.gz"
    (directory / name).rename(server / name)
    monkeypatch.setattr(fashion_mnist, "URL", server.as_uri())
    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    FashionMNIST(directory=directory, download=True, batch_size=8, validation_size=40).setup()
    assert (directory / name).read_bytes() == (server / name).read_bytes()
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.name != name} == kept


def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "nowhere").as_uri())
    target = tmp_path / "data"
    with pytest.raises(ConnectionError, match=r"Could not download .*-ubyte\.gz .*put the four files into"):
        FashionMNIST(directory=target, download=True, batch_size=8).prepare_data()
    assert list(target.iterdir()) == []


def test_a_download_of_something_else_is_refused_and_leaves_nothing(directory, tmp_path_factory, monkeypatch):
    server = tmp_path_factory.mktemp("server")
    name = "train-labels-idx1-ubyte.gz"
    (directory / name).unlink()
    (server / name).write_bytes(b"<html>Please log in</html>")
    monkeypatch.setattr(fashion_mnist, "URL", server.as_uri())
    with pytest.raises(ValueError, match="no whole gzip file"):
        FashionMNIST(directory=directory, download=True, batch_size=8).prepare_data()
    assert sorted(os.listdir(directory)) == sorted(
        ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]
    )


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_published_data_set_has_the_checksums_and_shapes():
    data = FashionMNIST(directory=INSTALLED, batch_size=32)
    (images, labels), (test_images, test_labels) = data.read()
    assert images.shape == (60_000, 1, 28, 28)
    assert test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(labels.long()).tolist() == [6_000] * 10
    assert torch.bincount(test_labels.long()).tolist() == [1_000] * 10
    pixels = images.double() / 255
    assert float(pixels.mean()) == pytest.approx(FashionMNIST.mean, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(FashionMNIST.std, abs=1e-4)
