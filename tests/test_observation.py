import pytest
import torch
from helpers.references import ConvNet, assert_same, inputs, population, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit


class _Recorder(nn.Module):
    """Keeps what it passes on, to compare with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x


LAYERS = {
    "1d of vectors": (lambda: nn.BatchNorm1d(3), (9, 3)),
    "1d of sequences": (lambda: nn.BatchNorm1d(3), (9, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 3, 2)),
    "no running statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 4)),
    "no affine": (lambda: nn.BatchNorm2d(3, affine=False), (5, 3, 4, 4)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (5, 3, 4, 4)),
    "momentum 0": (lambda: nn.BatchNorm2d(3, momentum=0.0), (5, 3, 4, 4)),
    "momentum 1": (lambda: nn.BatchNorm2d(3, momentum=1.0), (5, 3, 4, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_of_the_family_is_seen_in_every_mode(kind, grad, training):
    make, shape = LAYERS[kind]
    recorder = _Recorder()
    model = nn.Sequential(recorder, make()).train(training)
    with torch.set_grad_enabled(grad), bnkit.observe(model) as seen:
        model((torch.randn(shape) * 0.01 + 0.02).requires_grad_(grad))
        model((torch.randn(shape) * 0.03 - 0.01).requires_grad_(grad))
    mean, var = population(torch.cat(recorder.seen))
    assert seen["1"].count == torch.cat(recorder.seen).numel() / 3
    torch.testing.assert_close(seen["1"].mean, mean, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(seen["1"].var, var, rtol=1e-5, atol=0)
    own = training and (grad or kind == "momentum 1")
    assert seen.sources["1"] == ("layer" if own else "input")


def test_observing_changes_nothing():
    model, data = ConvNet(dropout=0.5), inputs()
    plain = ConvNet(dropout=0.5)
    plain.load_state_dict(model.state_dict())
    results = []
    for net, watch in ((model, True), (plain, False)):
        torch.manual_seed(3)
        with bnkit.observe(net) if watch else torch.enable_grad():
            net(data[0]).sum().backward()
        results.append([*net.state_dict().values(), *(p.grad for p in net.parameters()), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not model.bn1._forward_hooks


def test_hooks_are_gone_after_an_exception():
    model = ConvNet()
    before = snapshot(model)
    with pytest.raises(RuntimeError), bnkit.observe(model):
        model(torch.randn(2, 99, 8, 8))
    assert_same(before, snapshot(model))


def test_a_shared_layer_is_seen_at_every_call():
    shared, recorder = nn.BatchNorm1d(3), _Recorder()
    model = nn.Sequential(recorder, shared, nn.Linear(3, 3), recorder, shared)
    with bnkit.observe(model) as seen:
        model(torch.randn(8, 3))
    mean, var = population(torch.cat(recorder.seen))
    assert list(seen) == ["1"]
    torch.testing.assert_close((seen["1"].mean, seen["1"].var), (mean, var), rtol=1e-6, atol=1e-7)


def test_a_layer_that_is_not_reached_is_said_to_be_unseen():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})
    with bnkit.observe(model) as seen:
        assert seen.unseen == ["used", "unused"]
        model["used"](torch.randn(4, 2))
    assert seen.unseen == ["unused"]
    assert "unused" not in seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_does_not_count_twice(reentrant):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(16, 3, requires_grad=True)
    with bnkit.observe(net) as seen:
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    assert seen["1"].count == 16
    mean, var = population(net[0](x))
    torch.testing.assert_close((seen["1"].mean, seen["1"].var), (mean, var), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_observing_changes_nothing_under_activation_checkpointing(reentrant):
    results = []
    for watch in (True, False):
        torch.manual_seed(0)
        net, calls = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), []
        net[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = torch.randn(16, 3, requires_grad=True)
        with bnkit.observe(net) if watch else torch.enable_grad():
            checkpoint(net, x, use_reentrant=reentrant).sum().backward()
        results.append(([*net.state_dict().values(), x.grad], len(calls)))
    assert results[0][1] == results[1][1] == 2
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_reduced_in_float64(autocast):
    model = nn.Sequential(_Recorder(), nn.BatchNorm1d(3))
    x = torch.randn(64, 3)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), bnkit.observe(model) as seen:
        model(x)
    mean, var = population(model[0].seen[0])
    torch.testing.assert_close((seen["1"].mean, seen["1"].var), (mean, var), rtol=1e-6, atol=1e-7)


def test_a_subclass_with_its_own_forward_is_observed_by_its_input():
    class Scaled(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x * 2)

    model, x = nn.Sequential(Scaled(3)), torch.randn(8, 3)
    with bnkit.observe(model) as seen:
        model(x)
    assert seen.sources["0"] == "input"
    torch.testing.assert_close(seen["0"].var, population(x)[1])


def test_a_subclass_that_normalises_another_dimension_is_left_unseen():
    class Tokens(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(Tokens(3))
    with bnkit.observe(model) as seen:
        model(torch.randn(8, 5, 3))
    assert seen.unseen == ["0"]


def test_the_input_may_come_by_keyword():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    with bnkit.observe(nn.ModuleList([layer])) as seen:
        layer(input=x)
    torch.testing.assert_close(seen["0"].var, population(x)[1], rtol=1e-5, atol=0)


def test_a_hook_that_replaces_the_output_does_not_hide_the_layers_own_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_forward_hook(lambda _, args, output: output * 2)
    with bnkit.observe(model) as seen:
        model(torch.randn(8, 3))
    assert seen.sources["0"] == "layer"


def test_a_scripted_part_without_batch_norm_is_no_hindrance():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 3))), nn.BatchNorm1d(3))
    with bnkit.observe(model) as seen:
        model(torch.randn(8, 3))
    assert list(seen) == ["1"]


def test_exact_reduces_every_input():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(64, 3) * 1e-3 + 10
    with bnkit.observe(model, exact=True) as seen:
        model(x)
    torch.testing.assert_close((seen["0"].mean, seen["0"].var), population(x), rtol=1e-12, atol=0)
    assert seen.sources["0"] == "input"


def test_a_compiled_model_is_seen_and_named_as_its_original():
    model = ConvNet()
    compiled = torch.compile(model, backend="eager")
    x = inputs(1)[0]
    compiled(x)  # hooks that come after this call would never fire in compiled code
    with bnkit.observe(compiled) as seen:
        compiled(x)
    assert list(seen) == ["bn1", "bn2"]


def test_a_lazy_layer_is_seen_once_materialised():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'0'.*run one forward"), bnkit.observe(model):
        pass
    model(torch.randn(4, 3))
    with bnkit.observe(model) as seen:
        model(torch.randn(4, 3))
    assert list(seen) == ["0"]


def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match=r"before torch.jit.script"), bnkit.observe(torch.jit.script(ConvNet())):
        pass
