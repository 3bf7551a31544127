import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnkit.norms import Ghost, undo
from bnkit.norms.ghost import ghost_count, ghost_sizes

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def chunks(x, count, grouping):
    """The ghosts' indices, as a list."""
    if grouping == "strided":
        return [torch.arange(first, len(x), count) for first in range(count)]
    return list(torch.arange(len(x)).tensor_split(count))


@settings(max_examples=120, deadline=None)
@given(
    samples=st.integers(2, 23),
    size=st.integers(1, 9),
    grouping=st.sampled_from(["strided", "contiguous"]),
    space=st.sampled_from([(), (4,), (3, 2), (2, 1, 3), (1, 1)]),
    channels_last=st.booleans(),
    momentum=st.sampled_from([0.1, 1.0, None]),
    affine=st.booleans(),
)
def test_equals_a_loop_of_torch_over_the_chunks(samples, size, grouping, space, channels_last, momentum, affine):
    torch.manual_seed(samples * 31 + size)
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(space)]
    whole = kind(3, momentum=momentum, affine=affine, dtype=torch.float64)
    chunked, layer = copy.deepcopy(whole), copy.deepcopy(whole)
    Ghost(size, grouping).apply(layer)
    x = torch.randn(samples, 3, *space, dtype=torch.float64) * 2 + 3
    if channels_last and len(space) > 1:
        x = x.contiguous(memory_format=LAYOUTS[x.dim()])
    count = ghost_count(samples, size, one_value_each=x[0, 0].numel() == 1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    rows = chunks(x, count, grouping)
    expected = torch.cat([chunked(b[row]) for row in rows])[torch.cat(rows).argsort()]
    whole(x)
    output = layer(a)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(a.grad, b.grad, **close)
    for mine, other in zip(layer.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(whole, name), **close)


@given(samples=st.integers(0, 500), size=st.integers(1, 64))
def test_ghosts_differ_by_at_most_one_and_have_the_size_where_there_is_that_many(samples, size):
    sizes = ghost_sizes(samples, size)
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, samples)
    assert sizes == sorted(sizes, reverse=True)


@given(samples=st.integers(2, 500), size=st.integers(1, 64))
def test_no_ghost_has_a_single_value(samples, size):
    assert samples // ghost_count(samples, size, one_value_each=True) >= 2


def test_large_consecutive_ghosts_take_the_kernel_one_by_one_and_agree():
    whole = nn.BatchNorm2d(64, dtype=torch.float64)
    layer, other = copy.deepcopy(whole), copy.deepcopy(whole)
    Ghost(8, "contiguous").apply(layer)
    for x in (torch.randn(20, 64, 8, 9, dtype=torch.float64), torch.randn(16, 64, 8, 9, dtype=torch.float64)):
        assert x.numel() > 2 * 2**15
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        output, expected = layer(a), torch.cat([other(part) for part in b.tensor_split(2)])
        whole(x)
        torch.testing.assert_close(output, expected)
        output.square().mul(x).sum().backward()
        expected.square().mul(x).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(layer.running_var, whole.running_var)


def test_pooled_variance_counts_what_differs_between_ghosts():
    layer = nn.BatchNorm1d(1, momentum=1.0, dtype=torch.float64)
    Ghost(4, "contiguous").apply(layer)
    x = torch.tensor([0.0] * 4 + [10.0] * 4, dtype=torch.float64)[:, None]  # each ghost constant
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0))


def test_one_sample_is_refused_as_by_torch_and_fine_where_it_has_more_values():
    layer = nn.BatchNorm1d(3)
    Ghost(1).apply(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert layer(torch.randn(1, 3, 4)).shape == (1, 3, 4)


def test_one_ghost_is_batchnorm_bit_for_bit():
    plain = nn.BatchNorm2d(3)
    layer = copy.deepcopy(plain)
    Ghost(5).apply(layer)
    x = torch.randn(9, 3, 4, 4)
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))


def test_an_empty_batch_is_what_torch_makes_of_it():
    layer = nn.BatchNorm2d(3)
    Ghost(5).apply(layer)
    assert layer(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert layer.running_mean.isfinite().all()


def test_an_input_that_is_not_dense():
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    Ghost(4).apply(layer)
    other = copy.deepcopy(layer)
    x = torch.randn(16, 5, 4, 4, dtype=torch.float64)[::2, 1:4]
    torch.testing.assert_close(layer(x), other(x.contiguous()))


def test_a_failed_forward_leaves_the_statistics_alone():
    layer = nn.BatchNorm2d(3)
    Ghost(2).apply(layer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(8, 5, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_large_mean_costs_no_more_than_in_torch():
    plain = nn.BatchNorm2d(3, momentum=1.0)
    layer = copy.deepcopy(plain)
    Ghost(4).apply(layer)
    x = torch.randn(32, 3, 8, 8) * 0.1 + 1000
    layer(x)
    plain(x)
    truth = x.double().var((0, 2, 3))
    error, peer = (layer.running_var - truth).abs().max(), (plain.running_var - truth).abs().max()
    assert error <= 10 * peer + 1e-3 * truth.max()


def test_growing_the_ghost_keeps_what_was_learned():
    layer = nn.BatchNorm2d(3)
    weight = layer.weight
    for size in (2, 4, 8):
        Ghost(size).apply(layer)
        layer(torch.randn(16, 3, 2, 2))
    assert layer.num_batches_tracked == 3
    assert layer.weight is weight
    undo(layer)
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "4"])
def test_a_bad_size_is_said_in_one_sentence(size):
    with pytest.raises(ValueError, match=r"Ghost's size is a number of samples"):
        Ghost(size)


def test_a_bad_grouping_is_said_in_one_sentence():
    with pytest.raises(ValueError, match=r"'strided' or 'contiguous', not 'random'"):
        Ghost(4, "random")
