"""Probes: what a batch tells about a model beyond what training computes anyway, at the cost of passes of their own.

Each leaves the model as it was, also after an exception or Ctrl-C: weights, gradients, buffers, modes, hooks and random
states, bit for bit.
"""

from bnkit.probes.covariate_shift import CovariateShift, evenly, internal_covariate_shift
from bnkit.probes.dropout import dropout_variance_shift
from bnkit.probes.gap import GapReport, Loss, default_loss, train_eval_gap

__all__ = [
    "CovariateShift",
    "GapReport",
    "Loss",
    "default_loss",
    "dropout_variance_shift",
    "evenly",
    "internal_covariate_shift",
    "train_eval_gap",
]
