"""The numeric table of FACTS: bnkit beside fvcore's PreciseBN and torch's update_bn, on the same batches."""

import pytest
import torch
from helpers.references import population
from torch import nn
from torch.optim.swa_utils import update_bn

import bnkit

RATIOS = [0, 10, 1e2, 1e3, 1e4]
BOUNDS = {0: 1e-6, 10: 1e-6, 1e2: 1e-5, 1e3: 1e-4, 1e4: 1e-3}


def _batches(ratio):
    return list((torch.randn(4096, 8) * 0.1 + 0.1 * ratio).split(64))


def _bnkit(model, batches):
    bnkit.recalibrate(model, batches)


def _fvcore(model, batches):
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    precise_bn.update_bn_stats(model, batches, num_iters=len(batches))


def _error(recalibrate, batches):
    """Relative error of the variance, worst channel."""
    model = nn.Sequential(nn.BatchNorm1d(8))
    recalibrate(model.train(), batches)
    _, var = population(torch.cat(batches))
    return float(((model[0].running_var.double() - var).abs() / var).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_peer_is_more_exact(ratio):
    batches = _batches(ratio)
    ours = _error(_bnkit, batches)
    assert ours <= BOUNDS[ratio]
    assert ours <= _error(_fvcore, batches) + 1e-7
    assert ours <= _error(lambda model, data: update_bn(data, model), batches)


def test_fvcore_loses_the_variance_to_cancellation_far_from_zero():
    assert _error(_fvcore, _batches(1e4)) > 1 > 1e-3 > _error(_bnkit, _batches(1e4))


def test_update_bn_loses_the_variance_between_batches_of_a_sorted_loader():
    batches = [torch.randn(64, 8) + 3 * k for k in range(8)]
    assert _error(lambda model, data: update_bn(data, model), batches) > 0.5
    assert _error(_bnkit, batches) < 1e-6


def test_peers_leave_a_model_broken_by_the_loader_and_bnkit_does_not():
    def broken():
        yield torch.randn(8, 8)
        raise OSError("disk")

    outcomes = {}
    for name, run in {"bnkit": _bnkit, "torch": lambda model, data: update_bn(data, model)}.items():
        model = nn.Sequential(nn.BatchNorm1d(8))
        with pytest.raises(OSError, match="disk"):
            run(model, broken())
        outcomes[name] = (model[0].momentum, bool(model[0].running_mean.any()))
    assert outcomes == {"bnkit": (0.1, False), "torch": (None, True)}
