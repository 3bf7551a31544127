"""The variance shift of dropout."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bnkit.moments import Moments
from bnkit.shift import EPS, log_variance_ratio

__all__ = ["dropout_variance_shift"]


def dropout_variance_shift(
    training: Mapping[str, Moments | tuple[Tensor, Tensor]], without: Mapping[str, Moments], eps: float = EPS
) -> dict[str, Tensor]:
    r"""How much more variance a layer meets in training than without dropout, on the same batch and weights.

    $$\ln\frac{\sigma_{dropout}^2 + \epsilon}{\sigma^2 + \epsilon}$$

    Dropout upstream changes the variance that the running statistics learn, but is off at inference.

    Args:
        training: layer name -> what it met with dropout on: Moments, such as those of [`bnkit.observe`][], or mean
            and variance, each of shape (C,).
        without: layer name -> the same with dropout off, such as ``GapReport.seen``.
        eps: the layers' eps.

    Returns:
        Layer name -> shape (C,), float64, for the layers that are in both: 0 where no dropout is upstream. It is minus
        the logarithm of the paper's shift ratio $Var^{Test} / Var^{Train}$.

    Raises:
        ValueError: where no layer is in both, or a layer's channels differ.

    Source: Li, Chen, Hu, Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance
    Shift", 2018, section 3.

    Examples:
        >>> one = Moments(8, torch.zeros(1), torch.ones(1))
        >>> dropout_variance_shift({"bn": (torch.zeros(1), torch.ones(1) * 2)}, {"bn": one}, eps=0)
        {'bn': tensor([0.6931], dtype=torch.float64)}
    """
    names = [name for name in training if name in without]
    if not names:
        raise ValueError(
            f"No layer was seen both with dropout ({list(training)}) and without it ({list(without)}): "
            "observe the same model in both."
        )
    met = {name: training[name] for name in names}
    return {
        name: log_variance_ratio(seen if isinstance(seen, Moments) else Moments(1, *seen), without[name], eps)  # type: ignore[arg-type]
        for name, seen in met.items()
    }
