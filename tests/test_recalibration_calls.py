"""Which calls of a layer recalibrate() counts: each that succeeds, once, by what it normalised by."""

import contextlib

import pytest
import torch
from helpers.references import population
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit

FAILS = contextlib.suppress(ValueError)  # a model that catches what its layer raises, and goes on


def fails_before(bn, x):
    with FAILS:
        bn(x[0])  # three dimensions
    return [(bn(x), x)]


def fails_after(bn, x):
    out = bn(x)
    with FAILS:
        bn(x[:1, :, :1, :1])  # one value per channel
    return [(out, x)]


def fails_twice(bn, x):
    for _ in range(2):
        with FAILS:
            bn(x[0])
    return [(bn(x), x)]


def gets_nothing(bn, x):
    bn(x[:0])  # a detector without proposals
    return [(bn(x), x)]


def evaluates_in_between(bn, x):
    out = bn(x)
    bn.eval()
    other = bn(3 * x + 2)
    bn.train()
    return [(out, x), (other, 3 * x + 2)]


def changes_the_momentum(bn, x):
    momentum, bn.momentum = bn.momentum, 0.3
    out = bn(x)
    bn.momentum = momentum
    return [(out, x)]


def has_buffers_for_a_call(bn, x):
    state = {name: tensor.clone() for name, tensor in bn.state_dict().items()}
    return [(torch.func.functional_call(bn, state, (x,)), x)]


def replaces_its_buffers_afterwards(bn, x):
    out = bn(x)
    bn.running_mean = bn.running_mean * 0 + 7
    return [(out, x)]


def repeats_calls_in_a_backward_pass(bn, x):
    with torch.enable_grad():
        first = x.clone().requires_grad_()
        out = checkpoint(bn, first, use_reentrant=False)
        second = 2 * out + 3
        again = checkpoint(bn, second, use_reentrant=False)
        torch.autograd.grad(again.square().sum(), first)
    return [(out, x), (again, second)]


WAYS = [
    fails_before,
    fails_after,
    fails_twice,
    gets_nothing,
    evaluates_in_between,
    changes_the_momentum,
    has_buffers_for_a_call,
    replaces_its_buffers_afterwards,
    repeats_calls_in_a_backward_pass,
]


class Model(nn.Module):
    """Calls its layer in the plain way in every other batch, and keeps what went in."""

    def __init__(self, way, late):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.way, self.batches, self.met = way, int(late), []

    def forward(self, x):
        self.batches += 1
        calls = self.way(self.bn, x) if self.batches % 2 else [(self.bn(x), x)]
        self.met += [normalised.detach() for _, normalised in calls]
        return calls[-1][0]


@pytest.mark.parametrize("late", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_call_that_succeeds_counts_once(way, late):
    torch.manual_seed(0)
    model = Model(way, late)
    hooks = len(model.bn._forward_hooks), len(model.bn._forward_pre_hooks)
    bnkit.recalibrate(model, [torch.randn(16, 4, 6, 6) * (1 + i % 3) + i % 5 for i in range(6)], max_samples=None)
    mean, var = population(torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1) for x in model.met]))
    torch.testing.assert_close(model.bn.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.bn.running_var.double(), var, rtol=1e-6, atol=0)
    assert (len(model.bn._forward_hooks), len(model.bn._forward_pre_hooks)) == hooks
