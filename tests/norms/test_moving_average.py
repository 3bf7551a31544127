import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnkit
from bnkit import norms
from bnkit.norms import Context, MovingAverage, undo

STEPS = [(8, 3, 4, 4)] * 9


class Paper:
    """The paper's training step by its equations, with the windows as Python lists."""

    def __init__(self, layer, spec):
        self.spec, self.eps, self.momentum = spec, layer.eps, layer.momentum
        self.weight, self.bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        self.var = layer.running_var.clone()
        self.second, self.psi, self.step = [], [], 0

    def averaged(self, window):
        used = self.step > self.spec.window and self.step >= self.spec.warmup_steps
        return sum(window[-self.spec.window :]) / self.spec.window if used else window[-1]

    def __call__(self, x, upstream):
        def c(value):
            return value.view(1, -1, 1, 1)

        dims = (0, 2, 3)
        self.step += 1
        self.second.append((x * x).mean(dims))
        chi = (self.averaged(self.second) + self.eps).sqrt()
        r = (chi / (self.var + self.eps).sqrt()).clamp(1 / self.spec.r_max, self.spec.r_max)
        if self.step <= max(self.spec.renorm_steps, self.spec.warmup_steps):
            r = torch.ones_like(r)
        z = x / c(chi)
        self.var = (1 - self.momentum) * self.var + self.momentum * self.second[-1]
        scaled = upstream * c(self.weight * r)
        self.psi.append((scaled * z).mean(dims))
        grad = (scaled - z * c(self.averaged(self.psi))) / c(chi)
        output = c(self.weight * r) * z + c(self.bias)
        return output, grad, (upstream * c(r) * z).sum(dims), upstream.sum(dims)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        MovingAverage(3, warmup_steps=0, renorm_steps=5, r_max=1.1, center_weights=False),
        MovingAverage(2, warmup_steps=6, renorm_steps=0, center_weights=False),
        MovingAverage(1, warmup_steps=0, renorm_steps=100, center_weights=False),
    ],
    ids=repr,
)
def test_equals_the_papers_equations_step_by_step(spec, channels_last):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    spec.apply(layer)
    paper = Paper(layer, spec)
    for scale, shape in enumerate(STEPS, 1):
        x = torch.randn(shape, dtype=torch.float64) * scale
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        layer.zero_grad()
        output = layer(x)
        upstream = torch.randn_like(output)
        output.backward(upstream)
        expected, grad, grad_weight, grad_bias = paper(x.detach(), upstream)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(x.grad, grad)
        torch.testing.assert_close(layer.weight.grad, grad_weight)
        torch.testing.assert_close(layer.bias.grad, grad_bias)
        torch.testing.assert_close(layer.running_var, paper.var)
        assert not layer.running_mean.any()


def test_compiled_it_fills_the_same_windows():
    torch._dynamo.reset()
    layer = nn.BatchNorm2d(3)
    MovingAverage(2, warmup_steps=0, renorm_steps=3, center_weights=False).apply(layer)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    for step in range(6):
        x = (torch.randn(4, 3, 5, 5) * (1 + step)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        compiled(x).square().sum().backward()
        eager(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    for name, value in eager.averages.items():
        torch.testing.assert_close(layer.averages[name], value)


def test_resuming_exactly_needs_the_averages_beside_the_state_dict():
    spec = MovingAverage(2, warmup_steps=0, renorm_steps=3, center_weights=False)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for layer in (first, second):
        spec.apply(layer)
    for _ in range(5):
        first(torch.randn(4, 3, 5, 5, requires_grad=True)).square().sum().backward()
    assert set(first.state_dict()) == set(nn.BatchNorm2d(3).state_dict())
    second.load_state_dict(first.state_dict())
    for name, value in first.averages.items():
        second.averages[name].copy_(value)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for layer, given in ((first, x), (second, y)):
        layer(given).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_a_trained_layers_statistics_become_second_moments():
    layer = nn.BatchNorm2d(3, momentum=0.0)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    MovingAverage(center_weights=False).apply(layer)
    assert layer.running_mean.any()  # a swap alone changes no number
    layer(torch.randn(4, 3, 5, 5))
    torch.testing.assert_close(layer.running_var, torch.tensor([2.0, 5.0, 10.0]))
    assert not layer.running_mean.any()


@pytest.mark.parametrize("before", [nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 3, padding=1), nn.Linear(6, 3)])
def test_centred_weights_are_the_swaps_and_undone_gives_the_same_inference(before):
    linear = isinstance(before, nn.Linear)
    layer = nn.BatchNorm1d(3) if linear else nn.BatchNorm2d(3)
    model = nn.Sequential(copy.deepcopy(before), layer)
    weight, keys = model[0].weight, list(model.state_dict())
    MovingAverage(2, warmup_steps=0).apply(model[1], Context(convolution=model[0]))
    assert list(model.state_dict()) == keys
    shape = (8, 6) if linear else (8, 2, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mul(torch.rand(())).sum().backward()
        optimizer.step()
    x = torch.randn(shape)
    centre = weight.detach() - weight.detach().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    convolve = F.linear if linear else lambda *a: F.conv2d(*a, padding=before.padding)
    torch.testing.assert_close(model[0](x), convolve(x, centre, model[0].bias))
    expected = model.eval()(x)
    model = copy.deepcopy(model)
    undo(model[1])
    assert [type(module) for module in model] == [type(before), nn.BatchNorm1d if linear else nn.BatchNorm2d]
    assert torch.equal(model(x), expected)


def test_undone_before_any_training_the_weights_are_untouched():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = copy.deepcopy(model.state_dict())
    MovingAverage().apply(model[1], Context(convolution=model[0]))
    undo(model[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_order_of_undoing_does_not_matter():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    MovingAverage().apply(model[1], Context(convolution=model[0]))
    model(torch.randn(4, 2, 5, 5))
    other = copy.deepcopy(model)
    for module in model:
        undo(module)
    for module in reversed(other):
        undo(module)
    assert torch.equal(model[0].weight, other[0].weight)
    assert not model[0].weight.mean((1, 2, 3)).abs().gt(1e-6).any()


def test_without_a_convolution_before_it_is_refused():
    layer = nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="right before the layer, and there is none"):
        MovingAverage().apply(layer)
    assert type(layer) is nn.BatchNorm2d


def test_a_batch_of_one_and_an_empty_batch():
    layer = nn.BatchNorm2d(3)
    MovingAverage(center_weights=False).apply(layer)
    assert layer(torch.randn(1, 3, 1, 1)).isfinite().all()
    assert layer(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "settings", [{"window": 0}, {"warmup_steps": -1}, {"renorm_steps": 1.5}, {"r_max": 0.9}, {"center_weights": 1}]
)
def test_a_bad_value_is_said_in_one_sentence(settings):
    with pytest.raises(ValueError, match="MovingAverage's"):
        MovingAverage(**settings)


def test_a_population_is_remembered_by_its_second_moment():
    layer = nn.BatchNorm2d(3)
    MovingAverage(center_weights=False).apply(layer)
    mean, var = layer.remembers(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [2, 5, 10]


def _stack(layers=3, width=4):
    torch.manual_seed(0)
    modules = []
    for index in range(layers):
        modules += [nn.Conv2d(2 if index == 0 else width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(width * 36, 3))


def test_one_overflow_of_a_loss_scaler_skips_one_step():
    model = _stack()
    bnkit.swap(model, norms.MovingAverage(warmup_steps=5, renorm_steps=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    for step in range(60):
        loss = model(torch.randn(4, 2, 6, 6)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss * (torch.inf if step == 20 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9, "halved once"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def _trained():
    model = _stack()
    bnkit.swap(model, norms.MovingAverage())
    for _ in range(3):
        model(torch.randn(4, 2, 6, 6))
    return model


@pytest.mark.parametrize("order", ["swap, load", "load, swap"])
@pytest.mark.parametrize("checkpoint", ["moving average", "plain"])
def test_reverting_what_was_loaded_keeps_its_inference(checkpoint, order):
    source = _trained() if checkpoint == "moving average" else _stack()
    if checkpoint == "plain":
        source(torch.randn(4, 2, 6, 6) + 1)
    x = torch.randn(4, 2, 6, 6)
    expected = source.eval()(x)
    model = _stack()
    if order == "swap, load":
        bnkit.swap(model, norms.MovingAverage())
    model.load_state_dict(source.state_dict())
    if order == "load, swap":
        bnkit.swap(model, norms.MovingAverage())
    bnkit.revert(model)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-6, atol=1e-6)
