"""What is sent, counted: collectives and bytes, as functions of layers, channels and ranks. docs/scale.md has the page.

Bytes are of the tensors that a rank hands to torch.distributed ("sent"); by an all_gather it gets as many from every
rank. Python objects are pickled, which is counted apart.
"""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.processes import run
from torch import nn

import bnkit
from bnkit import moments, norms
from bnkit.monitoring import Monitor

pytestmark = pytest.mark.ddp

DOUBLE = 8
NETWORKS = [(1, 3), (4, 5), (3, 16)]  # layers, channels of each
WORLDS = [2, 4]


class Counted(list):
    """(collective, bytes sent) of each call while it is open; of an object's gather only that it was made."""

    @contextlib.contextmanager
    def open(self):
        with contextlib.ExitStack() as stack:
            for name in ("all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object"):
                stack.enter_context(mock.patch.object(dist, name, self._counting(name, getattr(dist, name))))
            yield self

    def _counting(self, name, function):
        def counting(*args, **options):
            # torch's own all_gather_object calls its module's all_gather, which is not this one
            tensor = {"all_gather": 1, "all_reduce": 0, "broadcast": 0}.get(name)
            self.append((name, 0 if tensor is None else args[tensor].nbytes))
            return function(*args, **options)

        return counting


def network(layers, channels):
    torch.manual_seed(0)
    blocks = [m for _ in range(layers) for m in (nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))]
    return nn.Sequential(*blocks)


def batches(channels, count=5):
    return list(torch.randn(count, 2, channels, 3, 3))


def _each(rank, world, counted, *arguments):
    """What is sent for each of the networks."""
    return [counted(rank, world, *network, *arguments) for network in NETWORKS]


def _recalibrated(rank, world, layers, channels, options):
    model, counted = network(layers, channels), Counted()
    torch.manual_seed(rank)
    with counted.open():
        report = bnkit.recalibrate(model, batches(channels), max_samples=None, **options)
    assert report.batches == 5 * world
    return counted


OBJECTS = [("all_gather_object", 0)]
STEP = ("all_gather", 3 * DOUBLE)  # has it failed, has it a batch, of how many samples
LOST = ("all_gather", 2 * DOUBLE)  # batches and samples left out


@pytest.mark.parametrize("world", WORLDS)
def test_recalibration_sends_three_numbers_a_batch_and_five_a_channel_at_the_end(world):
    def expected(layers, channels):
        pooled = ("all_gather", 5 * DOUBLE * layers * channels)  # count, mean, variance, batches, between
        return [*OBJECTS * 2, *[STEP] * (5 + 1), LOST, pooled, *OBJECTS]

    assert run(_each, world, _recalibrated, {}) == [[expected(*of) for of in NETWORKS]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_a_tolerance_costs_recalibration_five_numbers_a_channel_for_every_batch_but_the_first(world):
    layers, channels = 3, 4
    pooled = ("all_gather", 5 * DOUBLE * layers * channels)
    expected = [*OBJECTS * 2, STEP, *[STEP, pooled] * 4, STEP, LOST, pooled, *OBJECTS]
    assert run(_recalibrated, world, layers, channels, {"tolerance": 1e-9}) == [expected] * world


@pytest.mark.parametrize("world", WORLDS)
def test_a_prior_costs_recalibration_one_broadcast_of_two_numbers_a_channel(world):
    layers, channels = 3, 4
    prior = ("broadcast", 2 * DOUBLE * layers * channels)
    pooled = ("all_gather", 5 * DOUBLE * layers * channels)
    expected = [*OBJECTS * 2, prior, *[STEP] * (5 + 1), LOST, pooled, *OBJECTS]
    assert run(_recalibrated, world, layers, channels, {"prior_samples": 8}) == [expected] * world


@pytest.mark.parametrize("world", WORLDS)
def test_population_recalibration_sends_that_for_each_layer(world):
    def expected(layers, channels):
        pass_of_a_layer = [*[STEP] * (5 + 1), LOST, ("all_gather", 5 * DOUBLE * channels), *OBJECTS]
        return [*OBJECTS * 2, *OBJECTS * 3, *pass_of_a_layer * layers]

    options = {"consistency": "population"}
    assert run(_each, world, _recalibrated, options) == [[expected(*of) for of in NETWORKS]] * world


def _reduced(rank, world, limit):
    parts = torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    mine, counted = moments.Moments(5 + rank, parts[0], parts[1]), Counted()
    whole = mine.all_reduce()
    with mock.patch.object(moments, "_SLICE_ELEMENTS", limit), counted.open():
        sliced = mine.all_reduce()
    assert torch.equal(whole._packed(), sliced._packed())
    assert sliced.count.shape == ()
    assert torch.equal(moments.Moments.cat([mine, mine]).all_reduce().mean[40:], whole.mean)
    return counted


@pytest.mark.parametrize("world", WORLDS)
def test_where_the_ranks_numbers_are_many_they_are_gathered_in_slices_to_the_same_bits(world):
    room = 7  # channels of all ranks at a time
    found = run(_reduced, world, 5 * world * room + 1)
    assert found == [[("all_gather", 5 * DOUBLE * count) for count in (7, 7, 7, 7, 7, 5)]] * world


def _synchronized(rank, world, layers, channels, steps):
    model = network(layers, channels)
    bnkit.swap(model, norms.Sync())
    forward, backward, inference = Counted(), Counted(), Counted()
    for _ in range(steps):
        with forward.open():
            loss = model(batches(channels, 1)[0]).square().sum()
        with backward.open():
            loss.backward()
    with inference.open():
        model.eval()(batches(channels, 1)[0])
    return list(forward), list(backward), list(inference)


@pytest.mark.parametrize("world", WORLDS)
def test_sync_sends_2c_plus_1_numbers_a_layer_forward_and_2c_backward_and_none_at_inference(world):
    def expected(layers, channels):
        forward = [("all_gather", DOUBLE * (2 * channels + 1))] * layers * 3
        return forward, [("all_reduce", DOUBLE * 2 * channels)] * layers * 3, []

    assert run(_each, world, _synchronized, 3) == [[expected(*of) for of in NETWORKS]] * world


def _pooled(rank, world, layers, channels):
    model, counted = network(layers, channels), Counted()
    with counted.open():
        bnkit.swap(model, norms.Sync(group_size=1))
    swapped = list(counted)
    counted.clear()
    with counted.open():
        assert norms.pool_running_statistics(model) == layers
    return swapped, list(counted)


@pytest.mark.parametrize("world", WORLDS)
def test_swapping_sends_nothing_and_pooling_sub_groups_two_numbers_a_channel(world):
    layers, channels = 3, 4
    pooling = [("all_gather", 2 * DOUBLE * layers * channels)]
    assert run(_pooled, world, layers, channels) == [([], pooling)] * world


def _monitored(rank, world, layers, channels, every, across, frozen):
    model, counted = network(layers, channels), Counted()
    for index in range(frozen):
        model[2 * index + 1].eval()
    monitor = Monitor(model, every_n_steps=every, across_ranks=across)
    for step in range(2 * every):
        monitor.before()
        model(batches(channels, 1)[0])
        with counted.open():
            snapshot = monitor.after(step)
        assert (snapshot is not None) == ((step + 1) % every == 0)
    return counted


@pytest.mark.parametrize("world", WORLDS)
def test_the_monitor_across_ranks_sends_six_numbers_a_layer_for_each_step_and_six_more_whatever_the_channels(world):
    def expected(layers, _):
        return [("all_gather", DOUBLE * 6 * layers * (7 + 1))] * 2

    assert run(_each, world, _monitored, 7, True, 0) == [[expected(*of) for of in NETWORKS]] * world


def test_the_monitor_of_one_rank_sends_nothing():
    assert run(_monitored, 2, 3, 4, 2, False, 0) == [[]] * 2


def test_of_a_layer_whose_input_is_reduced_the_monitor_sends_ten_numbers():
    layers, frozen, every = 4, 1, 5
    snapshot = [("all_gather", DOUBLE * (6 * (layers - frozen) * (every + 1) + 10 * frozen))]
    assert run(_monitored, 2, layers, 3, every, True, frozen) == [snapshot * 2] * 2


# ---------------------------------------------------------------- the page's numbers


RESNET_50 = [64] * 7 + [256] * 4 + [128] * 8 + [512] * 5 + [256] * 12 + [1024] * 7 + [512] * 6 + [2048] * 4
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def _page_rows(ranks):
    """What the page says a ResNet-50 makes a rank send and receive, in bytes, by the formulas that are tested above."""
    layers, channels = len(RESNET_50), sum(RESNET_50)
    batch, call = 3 * DOUBLE, 5 * DOUBLE * channels + 2 * DOUBLE
    monitor = 6 * DOUBLE * layers * (50 + 1)
    forward = DOUBLE * sum(2 * width + 1 for width in RESNET_50)
    return {
        "recalibration, a batch": (batch, batch * ranks),
        "recalibration, a call": (call, call * ranks),
        "monitor across ranks, a snapshot": (monitor, monitor * ranks),
        "`Sync` forward, a step": (forward, forward * ranks),
        "pooling sub-groups": (2 * DOUBLE * channels, 2 * DOUBLE * channels * ranks),
    }


def test_the_page_tells_the_numbers_of_the_formulas():
    assert (len(RESNET_50), sum(RESNET_50)) == (53, 26_560)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if "|" in line
    ]
    told = {row[0]: row[1:] for row in rows if len(row) == 5}
    for place, ranks in enumerate((8, 64, 1024)):
        for what, (sent, received) in _page_rows(ranks).items():
            assert told[what][0] == f"{sent:,}", what
            assert told[what][1 + place] == f"{received:,}", (what, ranks)
