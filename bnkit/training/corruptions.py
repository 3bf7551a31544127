"""Corruptions of images at five severities: the shifts that a model meets after training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CORRUPTIONS", "SEVERITIES", "blur", "brightness", "contrast", "noise"]

SEVERITIES = (1, 2, 3, 4, 5)

# The numbers of ImageNet-C, but for blur: its 1 to 6 pixels of 224 would not be seen in 28.
_NOISE = (0.0, 0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of the range of the pixels
_BLUR = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0)  # standard deviation of the Gaussian, in pixels
_CONTRAST = (1.0, 0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of it
_BRIGHTNESS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # added, of the range of the pixels


def noise(images: Tensor, severity: int, *, seed: int = 0) -> Tensor:
    """Gaussian noise of standard deviation 0.08, 0.12, 0.18, 0.26 or 0.38, cut off at black and white.

    Args:
        images: of shape (N, C, H, W), between 0 (black) and 1 (white).
        severity: 1 to 5; 0 changes nothing.
        seed: of the noise; the severities scale the same noise.

    Returns:
        Images of the same shape and dtype, between 0 and 1.

    Raises:
        ValueError: for another severity, shape or range.
    """
    scale = _NOISE[_checked(images, severity)]
    generator = torch.Generator(images.device).manual_seed(seed)
    drawn = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + scale * drawn).clamp(0, 1)


def blur(images: Tensor, severity: int) -> Tensor:
    """Gaussian blur of standard deviation 0.5, 0.75, 1, 1.5 or 2 pixels; beyond the edge its pixels go on.

    Meant for images of about 28 x 28 pixels. See ``noise`` for arguments and errors.
    """
    sigma = _BLUR[_checked(images, severity)]
    if sigma == 0:
        return images.clone()
    radius = int(4 * sigma + 0.5)
    distances = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (distances / sigma) ** 2)
    kernel /= kernel.sum()
    channels = images.shape[1]
    rows, columns = (kernel.view(shape).expand(channels, 1, *shape[2:]) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    # A weighted mean stays in the range, but for rounding.
    return F.conv2d(F.conv2d(padded, rows, groups=channels), columns, groups=channels).clamp(0, 1)


def contrast(images: Tensor, severity: int) -> Tensor:
    """Each pixel's distance from its image's mean, times 0.4, 0.3, 0.2, 0.1 or 0.05.

    The mean is that of each channel. See ``noise`` for arguments and errors.
    """
    left = _CONTRAST[_checked(images, severity)]
    return torch.lerp(images.mean((2, 3), keepdim=True), images, left).clamp(0, 1)


def brightness(images: Tensor, severity: int) -> Tensor:
    """0.1, 0.2, 0.3, 0.4 or 0.5 added to each pixel, cut off at white.

    See ``noise`` for arguments and errors.
    """
    return (images + _BRIGHTNESS[_checked(images, severity)]).clamp(0, 1)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
}
"""The corruptions by name: functions of images (N, C, H, W) between 0 and 1 and a severity, which return such images.

Source:
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
    section 3 (ImageNet-C), for one channel or several, without its conversion to hue and saturation.
"""


def _checked(images: Tensor, severity: int) -> int:
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity must be 0 (none) to {SEVERITIES[-1]}, but is {severity!r}.")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floats of shape (N, C, H, W), but are {images.dtype} of {tuple(images.shape)}."
        )
    low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1) or math.isnan(low):
        raise ValueError(f"images must be between 0 and 1, but go from {low:g} to {high:g}.")
    return severity
