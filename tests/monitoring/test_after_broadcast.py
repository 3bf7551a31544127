"""What a monitor sees inside DistributedDataParallel, on every rank, against hooks of the test's own."""

import pytest
import torch
from helpers.processes import run
from helpers.references import population
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnkit


def _steps(rank, world_size, buffers):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model = DistributedDataParallel(network, broadcast_buffers=buffers)
    hooks = list(network._forward_pre_hooks)
    squares = []

    def look(layer, args):
        mean, _ = population(args[0])
        squares.append((mean - layer.running_mean.double()).square() / (layer.running_var.double() + layer.eps))

    network[1].register_forward_pre_hook(look)
    monitor = bnkit.Monitor(model, every_n_steps=12)
    torch.manual_seed(rank)
    for step in range(12):
        monitor.before()
        model(torch.randn(16, 4) + rank).square().mean().backward()
        snapshot = monitor.after(step, samples=16)
    left = list(network._forward_pre_hooks) != hooks
    monitor.before()
    monitor.close()
    expected = float(torch.stack(squares).mean().sqrt())
    return snapshot.layers["1"].mean_shift, expected, left, len(network._forward_pre_hooks)


@pytest.mark.ddp
@pytest.mark.parametrize("buffers", [True, False])
def test_every_rank_compares_with_the_statistics_that_its_step_began_with(buffers):
    for measured, expected, left, hooks in run(_steps, 2, buffers):
        assert measured == pytest.approx(expected, rel=1e-4)
        assert not left, "no hook outlives its step"
        assert hooks == 0


@pytest.mark.ddp
def test_a_compiled_module_is_left_alone():
    assert run(_hooks_of_compiled, 1) == [0]


def _hooks_of_compiled(rank, world_size):
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    monitor = bnkit.Monitor(torch.compile(DistributedDataParallel(network), backend="eager"))
    monitor.before()
    return len(network._forward_pre_hooks)
