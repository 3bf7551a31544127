import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnkit.norms import Context, Group, undo
from bnkit.norms.group import groups_for


def trained(channels=8):
    layer = nn.BatchNorm2d(channels, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(channels) + 0.5)
    return layer


@given(channels=st.integers(1, 300), num_groups=st.integers(1, 64))
def test_the_groups_are_the_largest_divisor_that_is_not_above(channels, num_groups):
    groups = groups_for(channels, num_groups)
    assert channels % groups == 0
    assert groups <= num_groups
    assert all(channels % more for more in range(groups + 1, min(num_groups, channels) + 1))


def test_folded_it_starts_where_inference_is():
    """A sample whose groups have exactly the population's statistics is normalised as by BatchNorm's inference."""
    plain = trained(4)
    x = torch.randn(1, 4, 30, 30, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    x = x * plain.running_var.sqrt().view(1, -1, 1, 1) + plain.running_mean.view(1, -1, 1, 1)
    layer = copy.deepcopy(plain)
    Group(2).apply(layer)
    torch.testing.assert_close(layer(x), plain.eval()(x))
    Group(2, fold=False).apply(layer)
    assert not torch.allclose(layer(x), plain(x), atol=1e-2)


def test_on_a_fresh_layer_it_is_torchs_group_norm():
    layer, peer = nn.BatchNorm2d(8), nn.GroupNorm(4, 8)
    Group(4).apply(layer)
    x = torch.randn(3, 8, 5, 5)
    torch.testing.assert_close(layer(x), peer(x))
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_a_plain_checkpoint_is_folded_also_when_loaded_after_the_swap():
    plain = trained()
    early, late = copy.deepcopy(plain), nn.BatchNorm2d(8, dtype=torch.float64)
    Group(2).apply(early)
    Group(2).apply(late)
    late.load_state_dict(plain.state_dict())
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    assert torch.equal(early(x), late(x))


def test_undone_the_layer_has_its_very_parameters_and_statistics():
    layer = trained()
    before = copy.deepcopy(layer.state_dict())
    Group(2).apply(layer)
    assert not layer.track_running_stats
    layer(torch.randn(3, 8, 5, 5, dtype=torch.float64))
    undo(layer)
    assert layer.track_running_stats
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_one_value_a_group_is_refused():
    layer = nn.BatchNorm1d(8)
    Group(8).apply(layer)
    with pytest.raises(ValueError, match="use fewer groups than channels"):
        layer(torch.randn(4, 8))
    assert layer(torch.randn(4, 8, 3)).shape == (4, 8, 3)


@pytest.mark.parametrize("settings", [{}, {"padding": 1, "padding_mode": "circular"}, {"groups": 2, "bias": False}])
def test_weight_standardization_is_the_convolutions_by_its_equation(settings):
    convolution = nn.Conv2d(4, 8, 3, dtype=torch.float64, **settings)
    layer, other = trained(), copy.deepcopy(convolution)
    weight = convolution.weight
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    Group(2, weight_standardization=True).apply(layer, Context(convolution=convolution))
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight is weight
    assert list(convolution.state_dict()) == list(other.state_dict())
    flat = other.weight.detach().flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    other.weight.data = flat.view_as(weight)
    expected = other(x)
    torch.testing.assert_close(convolution(x), expected)
    # What it standardizes has other statistics than the layer remembers, so nothing is folded.
    torch.testing.assert_close(layer(expected), F.group_norm(expected, 2, layer.weight, layer.bias, layer.eps))
    layer(convolution(x)).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    undo(layer)
    assert type(convolution) is nn.Conv2d
    assert "_bnkit_swapped" not in vars(convolution)


@pytest.mark.parametrize(
    ("convolution", "message"),
    [
        (None, "there is none"),
        (nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d"),
        (nn.Conv2d(8, 8, 1, groups=8), "more than one weight"),
    ],
)
def test_weights_that_cannot_be_standardized_are_refused_before_anything_changes(convolution, message):
    layer = trained()
    with pytest.raises(TypeError, match=message):
        Group(2, weight_standardization=True).apply(layer, Context(convolution=convolution))
    assert type(layer) is nn.BatchNorm2d
    assert layer.track_running_stats


@pytest.mark.parametrize("settings", [{"num_groups": 0}, {"num_groups": 2.0}, {"fold": 1}])
def test_a_bad_value_is_said_in_one_sentence(settings):
    with pytest.raises(ValueError, match="Group's"):
        Group(**settings)
