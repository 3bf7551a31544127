"""Independent references: what the answer must be, computed another way."""

import torch
from torch import nn


def population(x, channel_dim=1):
    """Mean and biased variance per channel of the whole, in float64."""
    x = x.detach().double().movedim(channel_dim, -1).flatten(0, -2)
    return x.mean(0), x.var(0, correction=0)


def assert_population(layer, x, rtol=1e-6):
    """The layer's running statistics are those of x."""
    mean, var = population(x)
    std = var.sqrt()
    assert ((layer.running_mean.double() - mean).abs() / std).max() < rtol + 1e-6 * (mean / std).abs().max()
    torch.testing.assert_close(layer.running_var.double(), var, rtol=rtol, atol=0)


def snapshot(model):
    """All that a call must leave alone: tensors with their identity, modes, momenta, hooks, classes."""
    return {
        "tensors": {
            name: (id(tensor), tensor.detach().clone())
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        },
        "modules": {
            name: (
                type(module),
                module.training,
                getattr(module, "momentum", None),
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        },
    }


def assert_same(before, after, except_running=()):
    """Nothing differs, bit for bit, but the running mean and variance of the layers named."""
    assert before["modules"] == after["modules"]
    assert before["tensors"].keys() == after["tensors"].keys()
    free = {f"{layer}.running_{what}" for layer in except_running for what in ("mean", "var")}
    for name, (identity, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, f"{name} is another tensor"
        if name not in free:
            assert torch.equal(torch.nan_to_num(after["tensors"][name][1]), torch.nan_to_num(tensor)), name


class ConvNet(nn.Module):
    """Two convolutions, each with BatchNorm, dropout between them."""

    def __init__(self, width=6, dropout=0.0, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.drop(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def inputs(batches=5, size=8, pixels=8, channels=2, offset=0.5):
    return [torch.randn(size, channels, pixels, pixels) + offset for _ in range(batches)]
