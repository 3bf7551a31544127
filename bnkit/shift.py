r"""The measures of activation shift, as plain functions of two Moments.

Per channel, with mean $\mu$ and biased variance $\sigma^2$ of what was observed and of a reference, such as
the running statistics, and BatchNorm's $\epsilon$:

$$
z = \frac{\mu_o - \mu_r}{\sqrt{\sigma_r^2 + \epsilon}}, \qquad
r = \frac{\sigma_o^2 + \epsilon}{\sigma_r^2 + \epsilon}
$$

z is what the reference would leave of the channel's mean after normalising it, and r of its variance; the divergences
are those of two normal distributions, and functions of z and r alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnkit.moments import Moments, to_float64

__all__ = [
    "Shift",
    "affine_magnitude",
    "all_finite",
    "batch_noise",
    "dead_channels",
    "kl_divergence",
    "log_variance_ratio",
    "mean_shift",
    "normalization_batch_size",
    "psi",
    "relu_zero_fraction",
    "shift",
    "wasserstein2",
]

EPS = 1e-5  # torch.nn.BatchNorm's default


class Shift(NamedTuple):
    """How one distribution lies to a reference, in the reference's own unit: all that the divergences need.

    Attributes:
        mean: z, any shape, in standard deviations of the reference.
        variance_ratio: r, the same shape, > 0.
    """

    mean: Tensor
    variance_ratio: Tensor

    @property
    def log_variance_ratio(self) -> Tensor:
        """``log r``: 0 where the variances are equal."""
        return self.variance_ratio.log()

    @property
    def kl(self) -> Tensor:
        """KL divergence of the observed from the reference, in nats, >= 0; see [`bnkit.shift.kl_divergence`][]."""
        return self._or_infinite(0.5 * (self.mean.square() + _minus_log(self.variance_ratio)))

    @property
    def psi(self) -> Tensor:
        """Population stability index, >= 0; see [`bnkit.shift.psi`][]."""
        # z² (1 + 1/r) + r + 1/r - 2, without the cancellation near r = 1 and without the overflow of r².
        spread = torch.hypot(self.mean, self.variance_ratio - 1) / self.variance_ratio.sqrt()
        return self._or_infinite(0.5 * (spread.square() + self.mean.square()))

    @property
    def wasserstein2(self) -> Tensor:
        """2-Wasserstein distance in standard deviations of the reference, >= 0; see [`bnkit.shift.wasserstein2`][]."""
        # The root of r less 1, without cancellation near r = 1.
        stretch = (self.variance_ratio - 1) / (self.variance_ratio.sqrt() + 1)
        return self._or_infinite(torch.hypot(self.mean, stretch))

    def _or_infinite(self, value: Tensor) -> Tensor:
        """The value, and infinity where r is infinite: there it would be the NaN of infinity less infinity."""
        return torch.where(self.variance_ratio.isposinf(), self.variance_ratio, value)


def _minus_log(r: Tensor) -> Tensor:
    """``r - 1 - log r``, to the last digits also where r is near 1 and its terms cancel."""
    excess = r - 1
    # log r = 2 artanh s, whose series converges fast for a small s; the first term cancels by hand.
    s = excess / (r + 1)
    square = s.square()
    tail = sum((square**k / (2 * k + 1) for k in range(1, 7)), start=torch.zeros_like(s))
    return torch.where(excess.abs() < 0.1, s * (excess - 2 * tail), excess - r.log())


def shift(observed: Moments, reference: Moments, eps: float = EPS) -> Shift:
    """The z and the r of every channel, each of shape (C,), float64.

    Args:
        observed: of a batch, or of many.
        reference: such as the running statistics: ``Moments(1, layer.running_mean, layer.running_var)``; moved to the
            device of ``observed``.
        eps: the layer's eps. With 0, a reference without variance makes r, and z but for equal means, infinite.

    Raises:
        ValueError: where the channels differ, or eps is negative.
    """
    if observed.mean.shape != reference.mean.shape:
        raise ValueError(
            f"Two Moments of one layer have one number of channels, not {len(observed.mean)} and {len(reference.mean)}."
        )
    if not eps >= 0:
        raise ValueError(f"eps is a variance, at least 0, not {eps!r}.")
    reference = reference.to(observed.mean.device)
    scale = reference.var + eps
    return Shift((observed.mean - reference.mean) / scale.sqrt(), (observed.var + eps) / scale)


def mean_shift(observed: Moments, reference: Moments, eps: float = EPS) -> Tensor:
    r"""How far the mean is off, in standard deviations of the reference.

    $$z = \frac{\mu_o - \mu_r}{\sqrt{\sigma_r^2 + \epsilon}}$$

    Args:
        observed: of a batch, or of many.
        reference: what it is measured against, such as the running statistics.
        eps: the layer's eps.

    Returns:
        Shape (C,), float64, any sign.

    Examples:
        >>> mean_shift(Moments(8, torch.tensor([3.0]), torch.ones(1)), Moments(8, torch.ones(1), torch.ones(1)), eps=0)
        tensor([2.], dtype=torch.float64)
    """
    return shift(observed, reference, eps).mean


def log_variance_ratio(observed: Moments, reference: Moments, eps: float = EPS) -> Tensor:
    r"""Logarithm of the ratio of the variances.

    $$\ln r = \ln\frac{\sigma_o^2 + \epsilon}{\sigma_r^2 + \epsilon}$$

    Args:
        observed: of a batch, or of many.
        reference: what it is measured against, such as the running statistics.
        eps: the layer's eps.

    Returns:
        Shape (C,), float64; 0 where they are equal, ln 2 where the observed variance is twice the reference's.

    Examples:
        >>> one = Moments(8, torch.zeros(1), torch.ones(1))
        >>> log_variance_ratio(one, one)
        tensor([0.], dtype=torch.float64)
    """
    return shift(observed, reference, eps).log_variance_ratio


def kl_divergence(observed: Moments, reference: Moments, eps: float = EPS) -> Tensor:
    r"""Kullback-Leibler divergence of the observed normal distribution from the reference's.

    $$KL = \tfrac12 (z^2 + r - 1 - \ln r)$$

    Args:
        observed: of a batch, or of many.
        reference: what it is measured against, such as the running statistics.
        eps: the layer's eps.

    Returns:
        Shape (C,), float64, in nats, >= 0.

    Source: Kullback, Leibler, "On Information and Sufficiency", 1951, for two normal distributions.

    Examples:
        >>> reference = Moments(8, torch.zeros(1), torch.ones(1))
        >>> kl_divergence(Moments(8, torch.full((1,), 2.0), torch.ones(1)), reference, eps=0)
        tensor([2.], dtype=torch.float64)
    """
    return shift(observed, reference, eps).kl


def wasserstein2(observed: Moments, reference: Moments) -> Tensor:
    r"""2-Wasserstein distance of the two normal distributions, in the activation's own unit.

    $$W_2 = \sqrt{(\mu_o - \mu_r)^2 + (\sigma_o - \sigma_r)^2}$$

    Args:
        observed: of a batch, or of many.
        reference: what it is measured against, such as the running statistics.

    Returns:
        Shape (C,), float64, >= 0. (``shift(…).wasserstein2`` has it in standard deviations of the reference, which can
        be compared across layers.)

    Source: Olkin, Pukelsheim, "The Distance between Two Random Vectors with Given Dispersion Matrices", 1982.

    Examples:
        >>> reference = Moments(8, torch.zeros(1), torch.ones(1))
        >>> wasserstein2(Moments(8, torch.full((1,), 3.0), torch.full((1,), 25.0)), reference)
        tensor([5.], dtype=torch.float64)
    """
    shift(observed, reference)  # the same channels?
    reference = reference.to(observed.mean.device)
    return torch.hypot(observed.mean - reference.mean, observed.std - reference.std)


def psi(observed: Moments, reference: Moments, eps: float = EPS) -> Tensor:
    r"""Population stability index: the symmetric divergence of the two normal distributions.

    $$PSI = KL(o \| r) + KL(r \| o) = \int (p_o - p_r) \ln\frac{p_o}{p_r}$$

    which is the index of credit scoring, $\sum (p_o - p_r) \ln(p_o / p_r)$, with bins of no width. Its customary
    limits (0.1, 0.25) are for scores, and say nothing here: compare with the layer's own spread.

    Args:
        observed: of a batch, or of many.
        reference: what it is measured against, such as the running statistics.
        eps: the layer's eps.

    Returns:
        Shape (C,), float64, >= 0.

    Source: Jeffreys' divergence; as PSI, Siddiqi, "Credit Risk Scorecards", 2006.

    Examples:
        >>> reference = Moments(8, torch.zeros(1), torch.ones(1))
        >>> psi(Moments(8, torch.full((1,), 2.0), torch.ones(1)), reference, eps=0)
        tensor([4.], dtype=torch.float64)
    """
    return shift(observed, reference, eps).psi


def relu_zero_fraction(weight: Tensor, bias: Tensor) -> Tensor:
    r"""Fraction of a channel's outputs that a ReLU right after the layer would set to 0.

    $$\Phi(-\beta / |\gamma|)$$

    for normally distributed inputs, whose variance is large beside the layer's eps.

    Args:
        weight: the layer's, shape (C,), any sign.
        bias: the layer's, shape (C,).

    Returns:
        Shape (C,), float64, from 0 to 1. Where the weight is 0: 1 if the bias is not positive, else 0.

    Examples:
        >>> relu_zero_fraction(torch.ones(2), torch.tensor([0.0, -4.0]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    weight, bias = to_float64(weight), to_float64(bias)
    fraction = 0.5 * torch.erfc(bias / (weight.abs() * math.sqrt(2)))
    return fraction.masked_fill((weight == 0) & (bias == 0), 1.0)  # 0 / 0; of 0, a ReLU leaves nothing


def dead_channels(
    observed: Moments, weight: Tensor | None, bias: Tensor | None, eps: float = EPS, threshold: float = 1e-3
) -> Tensor:
    r"""Which channels carry nothing on: their output does not vary, or a ReLU right after would leave nothing of it.

    $$
    |\gamma| \sqrt{\frac{\sigma^2}{\sigma^2 + \epsilon}} < t \quad\text{or}\quad 1 - \Phi(-\beta / |\gamma|) < t
    $$

    The second holds only for a layer with a ReLU right after it.

    Args:
        observed: what the layer normalised.
        weight: the layer's, shape (C,); None where it has none.
        bias: the layer's, shape (C,); None where it has none.
        eps: the layer's eps.
        threshold: t, > 0.

    Returns:
        Shape (C,), bool; False where nothing is known: where nothing was observed, or it is NaN.

    Examples:
        >>> observed = Moments(8, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
        >>> dead_channels(observed, torch.ones(3), torch.tensor([0.0, 0.0, -9.0]))
        tensor([False,  True,  True])
    """
    weight = torch.ones_like(observed.mean) if weight is None else to_float64(weight).to(observed.mean.device)
    bias = torch.zeros_like(observed.mean) if bias is None else to_float64(bias).to(observed.mean.device)
    share = torch.where(observed.var == 0, 0.0, observed.var / (observed.var + eps))
    constant = weight.abs() * share.sqrt() < threshold
    passes = relu_zero_fraction(weight, -bias)  # of the mirrored channel: what the ReLU lets through
    return (observed.count > 0) & (constant | (passes < threshold))


def affine_magnitude(weight: Tensor | None, bias: Tensor | None) -> tuple[float, float]:
    r"""Root mean square of $\gamma$ and of $\beta$ over the channels; 1 and 0 where there are none.

    Args:
        weight: the layer's, shape (C,); None where it has none.
        bias: the layer's, shape (C,); None where it has none.

    Examples:
        >>> affine_magnitude(torch.tensor([3.0, -4.0]), None)
        (3.5355339059327378, 0.0)
    """
    return (
        1.0 if weight is None else float(to_float64(weight).square().mean().sqrt()),
        0.0 if bias is None else float(to_float64(bias).square().mean().sqrt()),
    )


def all_finite(observed: Moments) -> bool:
    """Whether no mean and no variance is NaN or infinite.

    Args:
        observed: of a batch, or of many.

    Examples:
        >>> all_finite(Moments(2, torch.tensor([float("nan")]), torch.ones(1)))
        False
    """
    return bool(observed.mean.isfinite().all() & observed.var.isfinite().all())


def batch_noise(observed: Moments, eps: float = EPS) -> Tensor:
    r"""How much one batch's mean scatters, in standard deviations of the activation: the noise that training adds.

    $$\sqrt{\frac{\sum_b n_b (\mu_b - \mu)^2}{(B - 1)\,(n / B)\,(\sigma^2 + \epsilon)}}$$

    the root of the between-batch mean square of a one-way analysis of variance, over the number of values in a batch
    and over the variance. For uncorrelated values it is one over the root of that number; pixels of an image are not.

    Args:
        observed: pooled from B >= 2 batches drawn independently ([`Moments.pool`][bnkit.Moments.pool] keeps what lies
            between them).
        eps: the layer's eps.

    Returns:
        Shape (C,), float64, >= 0; infinite where fewer than two batches were pooled: nothing is known then.

    Examples:
        >>> two = Moments.pool([Moments(4, torch.tensor([m]), torch.ones(1)) for m in (-1.0, 1.0)])
        >>> batch_noise(two, eps=0)
        tensor([1.], dtype=torch.float64)
    """
    assert observed.batches is not None
    noise = observed.standard_error * observed.batches.sqrt() / (observed.var + eps).sqrt()
    return noise.masked_fill(observed.batches < 2, torch.inf)


def normalization_batch_size(noise: Tensor, samples: float, level: float) -> Tensor:
    r"""Samples that a batch should have for its mean to scatter by no more than this.

    $$N = samples \cdot (noise / level)^2$$

    since samples are independent, if their pixels are not.

    Args:
        noise: of batches of ``samples``, see [`bnkit.shift.batch_noise`][]; any shape.
        samples: that were normalised together.
        level: wanted noise, > 0, in standard deviations of the activation.

    Returns:
        The shape of ``noise``.

    Raises:
        ValueError: where samples or level is not positive.

    Examples:
        >>> normalization_batch_size(torch.tensor(0.4), samples=8, level=0.1).round()
        tensor(128.)
    """
    if not (samples > 0 and level > 0):
        raise ValueError(f"samples and level must be positive, but are {samples!r} and {level!r}.")
    return samples * (noise / level).square()
