import copy

import pytest
import torch
from torch import nn

from bnkit.norms import Frozen, undo


def trained():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model(torch.randn(8, 2, 6, 6))
    return model


def test_training_mode_is_inference_bit_for_bit_and_updates_nothing():
    model = trained()
    x = torch.randn(4, 2, 6, 6)
    expected = copy.deepcopy(model).eval()(x)
    Frozen().apply(model[1])
    before = copy.deepcopy(model.state_dict())
    model.train()
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
def test_weight_and_bias_learn_only_where_they_may(affine):
    model = trained()
    Frozen(affine).apply(model[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(4, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before["1.weight"]) is not affine
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_undo_lets_learn_again_what_did():
    layer = nn.BatchNorm2d(3)
    layer.bias.requires_grad_(False)
    Frozen(affine=False).apply(layer)
    Frozen(affine=False).apply(layer)
    assert not layer.weight.requires_grad
    undo(layer)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_a_single_sample_is_fine():
    layer = nn.BatchNorm1d(3)
    Frozen().apply(layer)
    assert layer(torch.randn(1, 3)).shape == (1, 3)


def test_a_bad_value_is_said_in_one_sentence():
    with pytest.raises(ValueError, match="Frozen's affine is True"):
        Frozen("no")
