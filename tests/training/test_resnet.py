from __future__ import annotations

import pytest
import torch
from torch import nn

from bnkit.training import BasicBlock, ResNet


@pytest.mark.parametrize("depths", [[1], [1, 1, 1], (2, 1), [1, 2, 1, 1]])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 28, 27)])
def test_logits_and_the_number_of_batch_norm_layers(depths, width, size):
    network = ResNet(in_channels=size[0], num_classes=7, width=width, depths=depths)
    assert network(torch.randn(2, *size)).shape == (2, 7)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 1 + 2 * sum(depths) + len(depths) - 1
    assert max(layer.num_features for layer in layers) == width * 2 ** (len(depths) - 1)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 1), (4, 4, 2), (4, 8, 2)])
def test_a_block_halves_the_image_by_its_stride(inputs, outputs, stride):
    y = BasicBlock(inputs, outputs, stride)(torch.randn(2, inputs, 7, 7))
    assert y.shape == (2, outputs, 7, 7) if stride == 1 else (2, outputs, 4, 4)


def test_a_block_whose_residual_is_zero_is_its_shortcut():
    block = BasicBlock(4, 4)
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_every_convolution_is_normalised_and_starts_as_he_et_al():
    torch.manual_seed(0)
    network = ResNet(width=32, depths=[1, 1])
    for convolution in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        assert convolution.bias is None
        fan_out = convolution.out_channels * convolution.weight[0, 0].numel()
        assert float(convolution.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


@pytest.mark.parametrize("options", [{"depths": []}, {"depths": [1, 0]}, {"width": 0}, {"num_classes": -1}])
def test_numbers_that_are_not_positive_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match="ResNet needs positive numbers") as error:
        ResNet(**options)
    assert f"{name}={value}" in str(error.value)
