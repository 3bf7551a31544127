"""On a CPU ghosts are normalised by passes over the tensor as it lies: the same as by calls of torch's batch norm."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bnkit.norms import Ghost, ghost_blocks
from bnkit.norms.ghost import ghost_count
from bnkit.norms.ghost_calls import GhostCalls
from bnkit.norms.ghost_passes import GhostPasses, can_pass

GROUPINGS = ["strided", "contiguous"]
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# One shape for each way that a tensor is seen: rows of one value, planes, rows; and rows that are summed by stretches.
WAYS = {"values": ((7, 3), False, 2**40), "planes": ((7, 3, 2, 2), False, 2**40), "rows": ((7, 3, 2, 2), True, 2**40)}
WAYS["stretches"] = ((7, 3, 2, 2), True, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=WAYS)
def way(request):
    shape, channels_last, long = WAYS[request.param]
    with patch.object(ghost_blocks, "LONG", long):
        yield shape, channels_last


@pytest.fixture(params=GROUPINGS)
def grouping(request):
    return request.param


def laid_out(x, channels_last):
    return x.contiguous(memory_format=LAYOUTS[x.dim()]) if channels_last and x.dim() in LAYOUTS else x


def sample(way, dtype=torch.float64):
    shape, channels_last = way
    return laid_out(torch.randn(shape, dtype=dtype) * 1.7 + 0.8, channels_last).requires_grad_()


def swapped(x, size=3, grouping="strided", **kwargs):
    layer = KINDS[x.dim()](x.shape[1], dtype=x.dtype, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    Ghost(size, grouping).apply(layer)
    return layer


def by_calls(layer, x):
    """The layer's output by torch's batch norm; and pooled mean and unbiased variance."""
    count = ghost_count(len(x), layer.spec.size, one_value_each=x[0, 0].numel() == 1)
    return GhostCalls(count, layer.spec.grouping, layer.weight, layer.bias, layer.eps, layer.running_mean)(x)


def gradients(output, upstream, inputs):
    return torch.autograd.grad(output, inputs, upstream, retain_graph=True)


def passes(output):
    """Whether this output is of the passes."""
    return type(output.grad_fn).__name__ == "GhostPassesBackward"


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(4, 19),
    size=st.integers(1, 6),
    grouping=st.sampled_from(GROUPINGS),
    space=st.sampled_from([(), (1,), (4,), (3, 2), (1, 1), (2, 1, 3)]),
    channels=st.sampled_from([1, 3, 17]),
    channels_last=st.booleans(),
    by_stretch=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    affine=st.booleans(),
    tracks=st.booleans(),
)
def test_the_passes_are_the_calls(
    samples, size, grouping, space, channels, channels_last, by_stretch, dtype, affine, tracks
):
    torch.manual_seed(samples * 31 + size)
    x = laid_out(torch.randn(samples, channels, *space, dtype=dtype) * 2 + 3, channels_last).requires_grad_()
    layer = swapped(x, size, grouping, affine=affine, track_running_stats=tracks, momentum=1.0)
    if by_calls_is_whole(x, size):
        return  # the layer is then torch's own
    with patch.object(ghost_blocks, "LONG", 1 if by_stretch else 2**40):
        output = layer(x)
        upstream = torch.randn_like(output)
        inputs = [x, *layer.parameters()]
        mine = gradients(output, upstream, inputs)
    assert passes(output)
    expected, mean, var = by_calls(layer, x)
    exact = copy.deepcopy(layer).double()
    reference = by_calls(exact, x.double())[0]
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4  # with two values a ghost, the gradient is ill-conditioned
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(output.double(), reference, **close)
    assert output.stride() == x.stride()
    if min(ghost_sizes_of(x, size)) * x[0, 0].numel() > 2 or dtype is torch.float64:
        for gradient, other in zip(mine, gradients(expected, upstream, inputs), strict=True):
            torch.testing.assert_close(gradient, other, **close)
    if tracks:
        torch.testing.assert_close(layer.running_mean, mean, **close)
        torch.testing.assert_close(layer.running_var, var, **close)


def by_calls_is_whole(x, size):
    return ghost_count(len(x), size, one_value_each=x[0, 0].numel() == 1) == 1


def ghost_sizes_of(x, size):
    count = ghost_count(len(x), size, one_value_each=x[0, 0].numel() == 1)
    return [len(x) // count, -(-len(x) // count)]


def test_the_gradient_and_the_gradients_gradient_are_right(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping, momentum=0.0)
    assert passes(layer(x))
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs)


def test_a_gradients_gradient_counts_a_weight_that_made_the_input_once(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping, track_running_stats=False)

    def second(output_of):
        made = x * layer.weight.view(1, -1, *[1] * (x.dim() - 2))
        (first,) = torch.autograd.grad(output_of(made).pow(3).sum(), layer.weight, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), (x, layer.weight))

    for mine, other in zip(second(layer), second(lambda made: by_calls(layer, made)[0]), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all parameters"])
def test_only_wanted_gradients_are_made(way, grouping, frozen):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name in ("weight", "bias") if frozen == "all parameters" else (frozen,):
        tensors[name].requires_grad_(False)
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    output = layer(x)
    upstream = torch.randn_like(output)
    for mine, other in zip(
        gradients(output, upstream, wanted), gradients(by_calls(layer, x)[0], upstream, wanted), strict=True
    ):
        torch.testing.assert_close(mine, other)
    output.backward(upstream)
    assert all(tensor.grad is None for tensor in tensors.values() if not tensor.requires_grad)


def test_an_upstream_gradient_may_lie_otherwise(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    output, expected = layer(x), by_calls(layer, x)[0]
    inputs = (x, layer.weight, layer.bias)
    contiguous = torch.randn(x.shape, dtype=x.dtype)
    for upstream in (contiguous, laid_out(contiguous, True), contiguous[:1, :1].expand_as(x), contiguous.flip(0)):
        mine, others = gradients(output, upstream, inputs), gradients(expected, upstream, inputs)
        assert mine[0].stride() == x.stride()
        for gradient, other in zip(mine, others, strict=True):
            torch.testing.assert_close(gradient, other)


def test_a_large_mean_costs_no_more_accuracy_than_in_torch(way, grouping):
    x = (sample(way, torch.float32).detach() * 0.1 + 1000).requires_grad_()
    layer = swapped(x, grouping=grouping)
    exact, true_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    truth = by_calls(exact, true_x)[0]
    upstream = torch.randn(x.shape)
    (true_gradient,) = torch.autograd.grad(truth, true_x, upstream.double())

    def errors(output):
        (gradient,) = torch.autograd.grad(output, x, upstream)
        return (output - truth).abs().max().item(), (gradient - true_gradient).abs().max().item()

    for mine, peer in zip(errors(layer(x)), errors(by_calls(layer, x)[0]), strict=True):
        assert mine <= 10 * peer + 1e-5


def test_autocast_leaves_float32_as_precise(way, grouping):
    x = sample(way, torch.float32)
    layer = swapped(x, grouping=grouping)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert torch.equal(output, expected)
    upstream = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (output, expected)))


def test_only_the_input_is_kept_for_the_backward_pass(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum().backward()
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]


def test_an_operation_in_place_may_follow_but_not_change_the_input(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    upstream = torch.randn_like(x)
    mine, expected = nn.functional.relu_(layer(x)), by_calls(layer, x)[0].relu()
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (mine, expected)))
    made = x * 1
    output = layer(made)
    made.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(way, grouping, reentrant):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    upstream = torch.randn_like(x)
    layer(x).backward(upstream)
    expected = [tensor.grad for tensor in (x, layer.weight, layer.bias)]
    x.grad = layer.weight.grad = layer.bias.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).backward(upstream)
    assert all(torch.equal(t.grad, e) for t, e in zip((x, layer.weight, layer.bias), expected, strict=True))


def test_transforms_see_the_operations_that_they_know(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping, track_running_stats=False)
    upstream = torch.randn(2, *x.shape, dtype=x.dtype)
    output = layer(x)
    expected = [torch.autograd.grad(output, x, each, retain_graph=True)[0] for each in upstream]
    (batched,) = torch.autograd.grad(output, x, upstream, is_grads_batched=True)
    _, pullback = torch.func.vjp(layer, x.detach())
    _, tangent = torch.func.jvp(layer, (x.detach(),), (upstream[0],))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), upstream[0]))).tangent
    torch.testing.assert_close(batched, torch.stack(expected))
    torch.testing.assert_close(pullback(upstream[0])[0], expected[0])
    torch.testing.assert_close(dual, tangent)
    torch.testing.assert_close((dual * upstream[1]).sum(), (expected[1] * upstream[0]).sum())
    each = torch.func.vmap(layer, randomness="error")(upstream)
    torch.testing.assert_close(each, torch.stack([layer(one) for one in upstream]))


def test_what_the_passes_cannot_take_goes_by_calls():
    x = torch.randn(8, 4, 3, 3)
    parameter = nn.Parameter(torch.ones(4))
    assert can_pass(x, parameter, None)
    assert not can_pass(x.bfloat16(), parameter)
    assert not can_pass(x, parameter.bfloat16())
    assert not can_pass(x, torch.ones(3))
    assert not can_pass(x.to("meta"), parameter.to("meta"))
    assert not can_pass(x[:, :, ::2], parameter)
    assert not can_pass(x.transpose(2, 3), parameter)
    assert not can_pass(x[:, :, :0], parameter)
    assert not can_pass(x.as_subclass(type("Marked", (torch.Tensor,), {})), parameter)


def test_without_a_graph_the_output_is_the_same(way, grouping):
    x = sample(way)
    layer = swapped(x, grouping=grouping)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x.detach().clone(memory_format=torch.preserve_format)), expected)


def test_large_tensors_are_summed_by_stretches_where_channels_are_last_only(grouping):
    for channels_last in (False, True):
        x = laid_out(torch.randn(4, 64, 24, 24, dtype=torch.float64), channels_last)
        assert ghost_blocks.GhostBlocks(x, 2, grouping).by_stretch is channels_last
        layer = swapped(x, 2, grouping)
        torch.testing.assert_close(layer(x), by_calls(layer, x)[0])


def test_the_function_gives_no_statistics_that_are_not_wanted():
    x = torch.randn(8, 3)
    assert GhostPasses.apply(x, None, None, 1e-5, 2, "strided", False)[1:] == (None, None)
