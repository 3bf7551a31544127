r"""Whether a layer has left its own usual spread.

A fixed limit is no good: pixels correlate, so that the statistics of a first layer scatter by far more than those of a
deep one where nothing is wrong. Each layer is compared with itself, over the steps before.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["ShiftChart", "staleness", "student_t_quantile"]


class ShiftChart:
    r"""A control chart of every layer's shift: is this step within the spread of those before?

    The measure (a divergence, > 0) is taken as its logarithm, of which the mean over ``subgroup`` steps in a row is
    compared with such means over the last ``window`` steps, those of the subgroup left out:

    $$t = \frac{y - \bar y}{s \sqrt{1 + q / W}}$$

    against Student's t with W / q - 1 degrees of freedom (W means that overlap count as W / q). The limit is for one
    false alarm in ``1 / rate`` steps over all layers together (Bonferroni's correction). Where the batches' means are
    normal, the logarithm of their sum of squares has a short upper tail, so that there are fewer.

    Source: Shewhart's chart for means; Montgomery, "Introduction to Statistical Quality Control", chapter 6.

    Args:
        layers: how many.
        rate: false alarms a step, over all layers, > 0.
        window: steps to learn the spread from; half of them must be known.
        subgroup: steps whose mean is judged.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, layers: int, *, rate: float, window: int = 100, subgroup: int = 3) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate is a number of false alarms a step between 0 and 1, not {rate!r}.")
        if subgroup < 1 or window < 10 * subgroup:
            raise ValueError(
                f"The spread is learnt from at least ten subgroups of at least one step; got a window of {window!r} "
                f"steps and subgroups of {subgroup!r}."
            )
        self.rate, self.window, self.subgroup = rate, window, subgroup
        # By the number of means that the spread was learnt from: of less than half the window, nothing is said.
        self._limits = torch.tensor(
            [
                student_t_quantile(1 - rate / max(1, layers), n / subgroup - 1) if n >= window / 2 else math.nan
                for n in range(window + 1)
            ],
            dtype=torch.float64,
        )
        # NaN: not known yet. One row for each step that a mean over the window can reach back to.
        self._past = torch.full((window + 2 * subgroup, layers), torch.nan, dtype=torch.float64)

    def update(self, values: Tensor) -> Tensor:
        """Judge further steps, and learn from them.

        Args:
            values: the measure, (K, L), on the CPU; NaN where it is not known.

        Returns:
            t over its limit, (K, L): above 1 is an alarm, NaN where nothing can be said.
        """
        logs = values.to(torch.float64).clamp_min(1e-12).log()
        scores = torch.full_like(logs, torch.nan)
        known = logs.isfinite()
        whole = known.all(0)
        if bool(whole.any()):
            scores[:, whole] = self._judge(logs[:, whole], whole)
        for layer in (known.any(0) & ~whole).nonzero().flatten().tolist():
            # A layer that takes no part in some of the steps: those in which it does follow on each other.
            rows = known[:, layer]
            column = torch.zeros_like(whole)
            column[layer] = True
            scores[rows, layer] = self._judge(logs[rows, layer].unsqueeze(1), column).flatten()
        return scores

    def state(self) -> Tensor:
        """What it has learnt, for a checkpoint; see ``restore``."""
        return self._past.clone()

    def restore(self, state: Tensor) -> None:
        """Go on from a ``state``; one of other layers or another window is not used."""
        if state.shape == self._past.shape:
            self._past = state.clone()

    def _judge(self, logs: Tensor, columns: Tensor) -> Tensor:
        q, window = self.subgroup, self.window
        series = torch.cat([self._past[:, columns], logs])
        self._past[:, columns] = series[-len(self._past) :]
        means = series.unfold(0, q, 1).mean(-1)  # row i: the mean of the q steps that end with step i + q - 1
        known = means.isfinite()
        means = means.nan_to_num()
        # Rows of the judged steps, and before each its reference: `window` rows that share no step with it.
        judged = torch.arange(len(means) - len(logs), len(means))
        first, last = judged - q - window + 1, judged - q + 1
        count, total = (_sums(x, first, last) for x in (known.to(torch.float64), means))
        mean = total / count
        # Deviations from a mean nearby, so that no large squares cancel.
        origin = means[judged[0] - q]
        squares = _sums(torch.where(known, means - origin, 0.0).square(), first, last)
        effective = count / q
        var = (squares / count - (mean - origin).square()).clamp_min(1e-12) * effective / (effective - 1)
        scores = (means[judged] - mean) / (var * (1 + 1 / effective)).sqrt()
        limit = self._limits[count.long()]
        return torch.where(known[judged], scores / limit, torch.nan)


def _sums(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sums of the rows from each ``first`` up to, without, ``last``."""
    cumulative = torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)])
    return cumulative[last] - cumulative[first]


def staleness(shifts: Tensor, noise_squared: Tensor, rate: float) -> tuple[float, float, float]:
    r"""Whether fixed statistics are off for good, and not by a batch's chance.

    With the shifts of n batches, the rms over channels of their mean (the bias b), and the rms of a batch mean's own
    noise (s): off where b exceeds both s and $t_{n-1}\, s / \sqrt{n}$, as if all channels were one, which errs on
    the side of silence.

    Args:
        shifts: of n batches the mean shift per channel, (n, C), on the CPU; see [`bnkit.shift.mean_shift`][].
        noise_squared: of each the sampling variance of its mean, from within the batch, (n, C). Not from the scatter of
            the batches: where the weights move, so do their means, and what is stale would excuse itself.
        rate: of false alarms, > 0.

    Returns:
        The score (above 1: off; NaN for fewer than six batches, or unknown noise), the bias and the noise, in standard
        deviations.
    """
    if len(shifts) < 6:
        return math.nan, math.nan, math.nan
    bias = float(shifts.to(torch.float64).mean(0).square().mean().sqrt())
    noise = max(float(noise_squared.to(torch.float64).mean().sqrt()), 1e-9)
    limit = noise * max(1.0, student_t_quantile(1 - rate, len(shifts) - 1) / math.sqrt(len(shifts)))
    return bias / limit, bias, noise


def student_t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution, for a probability of at least one half.

    Source: tail by the continued fraction of the incomplete beta function (Lentz's method; NIST Handbook of
    Mathematical Functions, 8.17.22), solved by Newton's method on its logarithm.
    """
    tail = 1 - probability
    x = max(0.0, NormalDist().inv_cdf(probability))  # Student's is larger; from below, the steps are safe
    for _ in range(100):
        survival = _t_tail(x, degrees)
        log_density = (
            math.lgamma((degrees + 1) / 2)
            - math.lgamma(degrees / 2)
            - 0.5 * math.log(degrees * math.pi)
            - (degrees + 1) / 2 * math.log1p(x * x / degrees)
        )
        step = math.log(survival / tail) * survival / math.exp(log_density)
        x += step
        if abs(step) <= 1e-12 * max(1.0, x):
            break
    return x


def _t_tail(x: float, degrees: float) -> float:
    """Probability of more than x, x >= 0."""
    a, b, y = degrees / 2, 0.5, degrees / (degrees + x * x)
    if y > (a + 1) / (a + b + 2):  # where the fraction for the complement converges faster
        return 0.5 * (1 - _incomplete_beta(b, a, x * x / (degrees + x * x)))
    return 0.5 * _incomplete_beta(a, b, y)


def _incomplete_beta(a: float, b: float, y: float) -> float:
    """Regularised incomplete beta function."""
    if y <= 0:
        return 0.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(y) + b * math.log1p(-y) - math.log(a)
    )
    c, d = 1.0, 1 / (1 - (a + b) * y / (a + 1))
    fraction = d
    for m in range(1, 300):
        for term in (
            m * (b - m) * y / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * y / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction
