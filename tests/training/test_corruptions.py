"""The corruptions: how much they change, within which range, and against scipy's filter."""

from itertools import pairwise

import numpy
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bnkit.training.corruptions import CORRUPTIONS, SEVERITIES, blur, brightness, contrast, noise


@pytest.fixture
def images():
    """Two colour images with edges, black and white among their pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 28, 28, generator=generator)
    images[:, :, 8:20, 8:20] = 1.0
    images[:, :, :4] = 0.0
    return images


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_distance_from_the_original_grows_with_the_severity(images, name):
    distances = [(CORRUPTIONS[name](images, severity) - images).square().mean() for severity in (0, *SEVERITIES)]
    assert distances[0] == 0
    assert all(one < more for one, more in pairwise(distances))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_range_are_kept_and_the_input_is_left_alone(images, name, dtype):
    images = images.to(dtype)
    before = images.clone()
    for severity in (0, *SEVERITIES):
        corrupted = CORRUPTIONS[name](images, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == dtype
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        assert corrupted.data_ptr() != images.data_ptr()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_images_are_corrupted_alike_and_the_random_stream_is_left_alone(images, name):
    state = torch.get_rng_state()
    one = CORRUPTIONS[name](images, 3)
    torch.rand(7)
    torch.set_rng_state(state)
    assert torch.equal(CORRUPTIONS[name](images, 3), one)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_has_its_standard_deviation_and_another_seed_is_another_noise():
    grey = torch.full((4, 1, 100, 100), 0.5, dtype=torch.float64)
    drawn = noise(grey, 1) - 0.5
    assert drawn.std() == pytest.approx(0.08, rel=0.02)
    assert drawn.mean() == pytest.approx(0, abs=0.002)
    assert not torch.equal(noise(grey, 1, seed=1), noise(grey, 1))


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.5), (2, 0.75), (3, 1.0), (4, 1.5), (5, 2.0)])
def test_blur_is_scipys_gaussian(images, severity, sigma):
    images = images.double()
    expected = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    numpy.testing.assert_allclose(blur(images, severity).numpy(), expected, atol=1e-12)


def test_contrast_keeps_each_channels_mean_and_brightness_adds_up_to_white(images):
    images = images.double()
    spread = images.var((2, 3))
    mean = images.mean((2, 3))
    for severity, left in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        corrupted = contrast(images, severity)
        torch.testing.assert_close(corrupted.mean((2, 3)), mean)
        torch.testing.assert_close(corrupted.var((2, 3)), spread * left**2)
    for severity, more in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        torch.testing.assert_close(brightness(images, severity), torch.minimum(images + more, torch.tensor(1.0)))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_no_image_or_severity_is_refused(images, name):
    corrupt = CORRUPTIONS[name]
    with pytest.raises(ValueError, match=r"severity must be 0 .* but is 6"):
        corrupt(images, 6)
    with pytest.raises(ValueError, match="between 0 and 1, but go from 0 to 2"):
        corrupt(images * 2, 1)
    with pytest.raises(ValueError, match=r"of shape \(N, C, H, W\)"):
        corrupt(images[0], 1)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        corrupt((images * 255).byte(), 1)
    with pytest.raises(ValueError, match="nan"):
        corrupt(images.where(images < 1, torch.nan), 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_are_no_images(name):
    assert CORRUPTIONS[name](torch.empty(0, 1, 28, 28), 3).shape == (0, 1, 28, 28)
