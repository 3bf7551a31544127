"""The claims that hold for every variant, as one table."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnkit.norms import (
    Context,
    Domain,
    Frozen,
    Ghost,
    Group,
    MovingAverage,
    NormBatch,
    Renorm,
    Spec,
    Sync,
    Variant,
    original_class,
    plain_state_dict,
    spec_of,
    undo,
)

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(8, 6), (8, 6, 5), (8, 6, 3, 5), (8, 6, 2, 3, 2), (7, 6, 3, 2), (11, 6)]
CONTEXT = Context(device_batch=8)


@dataclass(frozen=True)
class Case:
    spec: Spec
    pools: bool = True  # training leaves mean and unbiased variance of the whole batch in the running buffers
    batch_inference: bool = True  # inference is BatchNorm's
    exact_gradient: bool = True
    spreads: bool = True  # running statistics may be missing


CASES = {
    "ghost": Case(Ghost(3)),
    "ghost-contiguous": Case(Ghost(3, "contiguous")),
    "ghost-of-all": Case(Ghost(64)),
    "sync": Case(Sync()),
    "norm-batch": Case(NormBatch(4)),
    "renorm": Case(Renorm(1.5, 0.3, 0), spreads=False),
    "renorm-cold": Case(Renorm(3.0, 5.0, 1000), spreads=False),
    "frozen": Case(Frozen(), pools=False, spreads=False),
    "frozen-affine": Case(Frozen(affine=False), pools=False, spreads=False),
    "group": Case(Group(3), pools=False, batch_inference=False),
    "group-unfolded": Case(Group(4, fold=False), pools=False, batch_inference=False),
    "domain": Case(Domain(("photo", "sketch")), spreads=False),
    "moving-average": Case(MovingAverage(4, center_weights=False), pools=False, exact_gradient=False, spreads=False),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(shape, dtype=torch.float64, **settings):
    """A plain layer whose parameters and buffers are no longer the initial ones."""
    layer = KINDS[len(shape)](shape[1], dtype=dtype, **settings)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(shape[1]) + 0.5)
    return layer


def swapped(case, shape, dtype=torch.float64, **settings):
    layer = trained(shape, dtype, **settings)
    case.spec.apply(layer, CONTEXT)
    return layer


def sample(shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=dtype) * 1.7 + 0.8).requires_grad_()


def columns(value, x):
    return value.view(1, -1, *[1] * (x.dim() - 2))


def exact(x, weight, bias, eps):
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean, var = x.mean(dims), x.var(dims, correction=0)
    return columns(weight, x) * (x - columns(mean, x)) / columns(var + eps, x).sqrt() + columns(bias, x)


def reference(case, plain, x):
    """The training forward by its equation, in plain tensor operations."""
    weight, bias, eps = plain.weight, plain.bias, plain.eps
    mean, var = plain.running_mean, plain.running_var
    spec = case.spec.resolve(CONTEXT)
    if isinstance(spec, Ghost):
        count = max(1, len(x) // spec.size)
        where = torch.arange(len(x)) % count
        if spec.grouping == "contiguous":
            where = where.sort().values
        rows = [(where == ghost).nonzero().flatten() for ghost in range(count)]
        parts = torch.cat([exact(x[ghost], weight, bias, eps) for ghost in rows])
        return parts[torch.cat(rows).argsort()]
    if isinstance(spec, Frozen):
        return columns(weight, x) * (x - columns(mean, x)) / columns(var + eps, x).sqrt() + columns(bias, x)
    if isinstance(spec, Group):
        groups = 3  # the largest divisor of 6 that is at most 3 and 4
        if spec.fold:
            means, variances = mean.view(groups, -1), var.view(groups, -1)
            group_mean = means.mean(1, keepdim=True)
            group_var = variances.mean(1, keepdim=True) + means.var(1, correction=0, keepdim=True)
            bias = bias + weight * ((group_mean - means) / (variances + eps).sqrt()).flatten()
            weight = weight * ((group_var + eps).sqrt() / (variances + eps).sqrt()).flatten()
        cut = x.reshape(len(x), groups, -1)
        cut = (cut - cut.mean(2, keepdim=True)) / (cut.var(2, correction=0, keepdim=True) + eps).sqrt()
        return columns(weight, x) * cut.reshape(x.shape) + columns(bias, x)
    if isinstance(spec, Renorm):
        dims = [dim for dim in range(x.dim()) if dim != 1]
        r_max, d_max = (spec.r_max, spec.d_max) if spec.warmup_steps == 0 else (1.0, 0.0)
        batch = (x.detach().var(dims, correction=0) + eps).sqrt()
        r = (batch / (var + eps).sqrt()).clamp(1 / r_max, r_max)
        d = ((x.detach().mean(dims) - mean) / (var + eps).sqrt()).clamp(-d_max, d_max)
        one, zero = torch.ones_like(weight), torch.zeros_like(weight)
        return columns(weight, x) * (exact(x, one, zero, eps) * columns(r, x) + columns(d, x)) + columns(bias, x)
    if isinstance(spec, MovingAverage):
        second = x.square().mean([dim for dim in range(x.dim()) if dim != 1])
        return columns(weight, x) * x / columns(second + eps, x).sqrt() + columns(bias, x)
    return exact(x, weight, bias, eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_equals_the_equation_with_all_gradients(case, shape):
    plain = trained(shape)
    layer = copy.deepcopy(plain)
    case.spec.apply(layer, CONTEXT)
    x = sample(shape)
    x_reference = x.detach().clone().requires_grad_()
    output, expected = layer(x), reference(case, plain, x_reference)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-10, atol=1e-10)
    if layer.weight.requires_grad:
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_take_batchnorms_step(case, momentum):
    for shape in SHAPES:
        plain, layer = trained(shape, momentum=momentum), swapped(case, shape, momentum=momentum)
        layer.load_state_dict(plain.state_dict())
        for _ in range(3):
            x = sample(shape)
            if case.pools:
                plain(x)
            elif isinstance(case.spec, MovingAverage):
                second = plain.running_var + plain.running_mean.square()
                plain.num_batches_tracked += 1
                factor = 1 / plain.num_batches_tracked.item() if momentum is None else momentum
                batch = x.detach().square().mean([dim for dim in range(x.dim()) if dim != 1])
                plain.running_var.copy_((1 - factor) * second + factor * batch)
                plain.running_mean.zero_()
            layer(x)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_inference_is_batchnorms_bit_for_bit(case):
    for shape in SHAPES:
        plain, layer = trained(shape, torch.float32).eval(), swapped(case, shape, torch.float32).eval()
        layer.load_state_dict(plain.state_dict())
        x = sample(shape, torch.float32)
        assert torch.equal(layer(x), plain(x)) is case.batch_inference


def test_gradcheck(case):
    if not case.exact_gradient:
        pytest.skip("its backward pass is not the gradient, by design")
    fixed = Case(Renorm(1.0, 0.0, 0)) if isinstance(case.spec, Renorm) else case  # r and d carry no gradient
    for shape in ((6, 6), (7, 6, 2)):
        layer = swapped(fixed, shape, momentum=0.0)
        inputs = [t for t in (sample(shape), layer.weight, layer.bias) if t.requires_grad]
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), inputs)


def test_train_eval_train(case):
    shape = SHAPES[2]
    layer, straight = swapped(case, shape), swapped(case, shape)
    straight.load_state_dict(layer.state_dict())
    batches = [sample(shape) for _ in range(3)]
    for batch in batches:
        expected = straight(batch)
    layer(batches[0])
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(batches[1])
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.train()(batches[1])
    assert torch.equal(layer(batches[2]), expected)


def test_state_dict_is_batchnorms_and_loads_both_ways(case):
    shape = SHAPES[2]
    plain, layer = trained(shape), swapped(case, shape)
    layer.load_state_dict(plain.state_dict(), strict=True)
    layer(sample(shape))
    state = plain_state_dict(layer)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in plain.state_dict().items()}
    if not isinstance(case.spec, Domain):
        assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name])


def test_undo_gives_the_very_layer_back(case):
    layer = trained(SHAPES[2])
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before, flags = dict(vars(layer)), [p.requires_grad for p in layer.parameters()]
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    contents = {name: dict(layer.__dict__[name]) for name in ("_parameters", "_buffers")}
    case.spec.apply(layer, CONTEXT)
    assert isinstance(layer, nn.BatchNorm2d)
    assert isinstance(layer, Variant) == (spec_of(layer) is not None)
    assert original_class(layer) is nn.BatchNorm2d
    Ghost(2).apply(layer)
    case.spec.apply(layer, CONTEXT)
    layer(sample(SHAPES[2]))
    now = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert all(now[name] is tensor for name, tensor in tensors.items())
    undo(layer)
    assert type(layer) is nn.BatchNorm2d
    assert vars(layer) == before
    assert {name: dict(layer.__dict__[name]) for name in contents} == contents
    assert [p.requires_grad for p in layer.parameters()] == flags
    assert layer._non_persistent_buffers_set == set()
    assert calls
    assert not undo(layer)


def test_deepcopy_and_pickle_go_on_alike(case):
    shape = SHAPES[4]
    layer = swapped(case, shape)
    layer(sample(shape))
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stored, weights_only=False)]
    x = sample(shape)
    expected = layer(x)
    for other in copies:
        assert type(other) is type(layer)
        assert torch.equal(other(x), expected)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
        undo(other)
        assert type(other) is nn.BatchNorm2d
    assert original_class(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("shape", [(8, 6, 4, 5), (7, 6, 4, 5), (8, 6, 2, 3, 4)], ids=str)
def test_channels_last_is_kept(case, shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer, x = swapped(case, shape), sample(shape).detach()
    other = copy.deepcopy(layer)
    last = x.contiguous(memory_format=layout).requires_grad_()
    x.requires_grad_()
    output, expected = layer(last), other(x)
    assert output.is_contiguous(memory_format=layout)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream.contiguous())
    torch.testing.assert_close(last.grad, x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, other.running_var)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16 input", "bfloat16 layer"])
def test_bfloat16_stays_bfloat16_and_statistics_stay_exact(case, mode, layout):
    shape = (8, 6, 5, 5)
    layer = swapped(case, shape, torch.float32)
    accurate = copy.deepcopy(layer).double()
    x = sample(shape, torch.float32).detach().bfloat16().contiguous(memory_format=layout).requires_grad_()
    if mode == "bfloat16 layer":
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = layer(x)
    output.float().square().sum().backward()
    expected = accurate(x.detach().double())
    assert output.dtype is x.grad.dtype is torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=0.03, atol=0.06)
    precise = mode != "bfloat16 layer"
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        assert value.dtype is (torch.float32 if precise else torch.bfloat16)
        tolerance = 1e-5 if precise else 2e-2
        torch.testing.assert_close(value.double(), getattr(accurate, name), rtol=tolerance, atol=tolerance)


def test_compiles(case):
    if isinstance(case.spec, NormBatch):
        pytest.skip("it compiles as what it resolves to")
    torch._dynamo.reset()
    one_graph = not isinstance(case.spec, MovingAverage)
    layer = swapped(case, SHAPES[2], torch.float32)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=one_graph)
    for samples in (8, 11):
        x = sample((samples, 6, 3, 5), torch.float32)
        y = x.detach().clone().requires_grad_()
        output, expected = compiled(x), eager(y)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        output.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    compiled.eval()
    torch.testing.assert_close(compiled(x), eager.eval()(x), rtol=1e-5, atol=1e-5)


def test_without_affine_parameters(case):
    shape = SHAPES[2]
    layer, full = swapped(case, shape, affine=False), swapped(case, shape)
    full.load_state_dict(layer.state_dict() | {"weight": torch.ones(6), "bias": torch.zeros(6)})
    x = sample(shape)
    y = x.detach().clone().requires_grad_()
    output, expected = layer(x), full(y)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)


def test_without_running_statistics(case):
    layer = KINDS[4](6, track_running_stats=False)
    if not case.spreads:
        with pytest.raises(ValueError, match="track_running_stats=True"):
            case.spec.apply(layer, CONTEXT)
        assert type(layer) is nn.BatchNorm2d
        return
    case.spec.apply(layer, CONTEXT)
    x = sample((8, 6, 3, 3), torch.float32)
    layer(x)
    if case.batch_inference:
        plain = nn.BatchNorm2d(6, track_running_stats=False).eval()
        assert torch.equal(layer.eval()(x), plain(x))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_statistics_that_are_not_to_be_tracked_stay(case):
    layer = swapped(case, SHAPES[2])
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    layer(sample(SHAPES[2]))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(8, 6, 3), (8, 6, 3, 3, 3), (8, 6)], ids=str)
def test_a_wrong_number_of_dimensions_is_refused_as_by_torch(case, shape):
    layer = swapped(case, SHAPES[2])
    for mode in (True, False):
        with pytest.raises(ValueError, match="expected 4D input"):
            layer.train(mode)(sample(shape))


def test_moves_and_casts_with_its_model(case):
    model = nn.Sequential(trained(SHAPES[2]))
    case.spec.apply(model[0], CONTEXT)
    model.float().to("cpu")
    output = model(sample(SHAPES[2], torch.float32))
    assert output.dtype is torch.float32
    assert F.mse_loss(output, output.double().float()) == 0


def test_an_unknown_subclass_is_named_and_left_alone(case):
    class Activated(nn.BatchNorm2d):
        pass

    layer = Activated(6)
    with pytest.raises(TypeError, match="Activated"):
        case.spec.apply(layer, CONTEXT)
    assert type(layer) is Activated


def test_a_spec_says_itself_in_the_layers_line(case):
    layer = swapped(case, SHAPES[2])
    assert repr(case.spec.resolve(CONTEXT)) in repr(layer)
    assert hash(case.spec) == hash(copy.deepcopy(case.spec))
    assert pickle.loads(pickle.dumps(case.spec)) == case.spec


def test_an_empty_batch_gives_an_empty_output(case):
    layer = swapped(case, SHAPES[2])
    x = torch.empty(0, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == x.grad.shape == x.shape
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()
