import copy
import math
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.processes import run
from helpers.references import ConvNet, assert_same, inputs, population, snapshot
from torch import nn
from torch.nn import functional as F

import bnkit
from bnkit import Moments, norms
from bnkit.probes import (
    CovariateShift,
    dropout_variance_shift,
    evenly,
    internal_covariate_shift,
    train_eval_gap,
)


@contextmanager
def unchanged(model):
    """Nothing of the model, its gradients and the random states is another afterwards."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = snapshot(model), {name: (id(p.grad), p.grad.clone(), p._version) for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    wanted = [p.requires_grad for p in model.parameters()]
    try:
        yield
    finally:
        assert_same(before[0], snapshot(model))
        for name, parameter in model.named_parameters():
            identity, grad, version = before[1][name]
            assert id(parameter.grad) == identity
            assert torch.equal(parameter.grad, grad)
            assert parameter._version == version
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
        assert [p.requires_grad for p in model.parameters()] == wanted


def labelled(size=8):
    """A batch, made without the global random state."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 2, 8, 8, generator=generator) + 0.5, torch.arange(size) % 3


def settle(model, data, momentum=None):
    """Give the layers running statistics by some training forwards."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum
    for x in data:
        model.train()(x)
    return model


def noisy(model, batch):
    """A forward that uses all kinds of randomness."""
    random.random()
    np.random.rand()
    return F.dropout(model(batch[0]), 0.2)


# train_eval_gap


def test_the_gap_is_that_of_the_two_forwards_made_by_hand():
    model, batch = settle(ConvNet(dropout=0.5), inputs(3)), labelled()
    by_hand = copy.deepcopy(model)
    by_hand.drop.p = 0.0
    with torch.no_grad():
        running, by_batch = by_hand.eval()(batch[0]), by_hand.train()(batch[0])
    report = train_eval_gap(model, batch)
    losses = [F.cross_entropy(output, batch[1]).item() for output in (by_batch, running)]
    assert [report.loss_batch, report.loss_running] == pytest.approx(losses)
    assert report.loss == pytest.approx(losses[1] - losses[0])
    assert report.loss != 0
    assert report.disagreement == pytest.approx((by_batch.argmax(1) != running.argmax(1)).double().mean().item())
    expected = ((running - by_batch).double().square().mean() / by_batch.double().square().mean()).sqrt().item()
    assert report.output == pytest.approx(expected)
    assert report.samples == 8
    mean, var = population(by_hand.conv1(batch[0]))
    torch.testing.assert_close(report.seen["bn1"].mean, mean)
    torch.testing.assert_close(report.seen["bn1"].var, var)
    assert list(report.seen) == ["bn1", "bn2"]


def test_there_is_no_gap_where_the_running_statistics_are_the_batchs():
    model, batch = ConvNet().double(), (inputs(1)[0].double(), torch.arange(8) % 3)
    with bnkit.observe(model, exact=True) as seen:
        model(batch[0])
    for name in ("bn1", "bn2"):
        layer = getattr(model, name)
        layer.running_mean.copy_(seen[name].mean)
        layer.running_var.copy_(seen[name].var)
    report = train_eval_gap(model, batch)
    assert abs(report.loss) < 1e-12
    assert report.output < 1e-12
    assert report.disagreement == 0


SWAPS = {
    "plain": None,
    "ghost": norms.Ghost(4),
    "renorm": norms.Renorm(warmup_steps=0),
    "moving average": norms.MovingAverage(window=2, warmup_steps=1, center_weights=False),
    "sync": norms.Sync(),
    "group": norms.Group(2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_gap_leaves_all_as_it_was(swap, training):
    model = ConvNet(dropout=0.5)
    if SWAPS[swap] is not None:
        bnkit.swap(model, SWAPS[swap])
    model.train()(inputs(1)[0]).sum().backward()
    model.train(training)
    with unchanged(model):
        report = train_eval_gap(model, labelled(), forward=noisy)
    assert set(report.seen) == {"bn1", "bn2"}
    if swap not in ("group",):  # which does not know the batch
        assert report.output > 1e-3


def test_layers_that_normalise_a_sample_by_itself_or_by_constants_have_no_gap():
    for spec in (norms.Group(2), norms.Frozen()):
        model = ConvNet(dropout=0.5)
        bnkit.swap(model, spec)
        report = train_eval_gap(model, labelled())
        assert report.output == 0
        assert report.loss == 0


def test_a_ghosts_gap_is_by_its_ghosts():
    model, batch = settle(ConvNet(), inputs(2)), labelled()
    bnkit.swap(model, norms.Ghost(2))
    with torch.no_grad():
        by_batch = copy.deepcopy(model).train()(batch[0])
    assert train_eval_gap(model, batch).loss_batch == pytest.approx(F.cross_entropy(by_batch, batch[1]).item())


def test_layers_held_frozen_normalise_by_their_running_statistics_in_both_passes():
    model, batch = settle(ConvNet(), inputs(2)), labelled()
    model.bn1.eval()
    by_hand = copy.deepcopy(model)
    with torch.no_grad(), unchanged(model):
        expected = F.cross_entropy(by_hand(batch[0]), batch[1]).item()
        report = train_eval_gap(model, batch)
    assert report.loss_batch == pytest.approx(expected)
    model.bn2.eval()
    assert train_eval_gap(model, batch).output == 0


def test_a_model_in_evaluation_mode_has_the_gap_of_its_training_mode():
    model, batch = settle(ConvNet(dropout=0.5), inputs(2)), labelled()
    assert train_eval_gap(model.eval(), batch)[:6] == train_eval_gap(model.train(), batch)[:6]


def test_layers_without_running_statistics_normalise_by_the_batch_in_both_passes():
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    report = train_eval_gap(model, inputs(1))
    assert report.output == 0
    assert "0" in report.seen


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.bn(self.bn(x * 2).relu()))


def test_a_layer_that_is_used_twice_has_the_moments_of_both_calls():
    model, x = Shared(), torch.randn(8, 3) + 1
    first = copy.deepcopy(model).bn(x * 2).relu()
    with unchanged(model):
        report = train_eval_gap(model, x)
    torch.testing.assert_close(report.seen["bn"].mean, population(torch.cat((x * 2, first)))[0])
    assert report.seen["bn"].count == 16


def test_synchronized_layers_of_torch_work_in_one_process():
    plain, batch = settle(ConvNet(), inputs(2)), labelled()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    with unchanged(synchronized):
        report = train_eval_gap(synchronized, batch)
    assert report[:6] == pytest.approx(train_eval_gap(plain, batch)[:6])


def _gap_on_rank(rank, world_size):
    torch.manual_seed(0)
    model, batch = ConvNet(), labelled(8)
    bnkit.swap(model, norms.Sync())
    with unchanged(model):
        return train_eval_gap(model, [part[rank::world_size] for part in batch])


@pytest.mark.ddp
def test_layers_synchronized_over_ranks_normalise_by_the_batch_of_all_ranks():
    torch.manual_seed(0)
    expected = train_eval_gap(ConvNet(), labelled(8))
    found = run(_gap_on_rank, 2)
    assert sum(report.loss for report in found) / 2 == pytest.approx(expected.loss, rel=1e-4)
    assert sum(report.loss_batch for report in found) / 2 == pytest.approx(expected.loss_batch)
    pooled = found[0].seen["bn1"] + found[1].seen["bn1"]  # seen is the rank's own
    torch.testing.assert_close(pooled.mean, expected.seen["bn1"].mean)
    assert not torch.allclose(found[0].seen["bn1"].mean, pooled.mean)


@pytest.mark.parametrize("part", ["all", "a part"])
def test_a_compiled_model_is_probed_and_stays_compiled(part):
    plain, batch, compilations = nn.Sequential(settle(ConvNet(), inputs(2))), labelled(), []

    def backend(graph, example):
        compilations.append(graph)
        return graph

    model = copy.deepcopy(plain)
    if part == "all":
        model = torch.compile(model, backend=backend)
    else:
        model[0] = torch.compile(model[0], backend=backend)
    for net in (model, model, plain, plain):
        net(batch[0])
    number = len(compilations)
    with unchanged(model):
        report = train_eval_gap(model, batch)
    model(batch[0]).sum().backward()
    plain(batch[0])
    assert len(compilations) == number > 0
    expected = train_eval_gap(plain, batch)
    assert list(report.seen) == list(expected.seen) == ["0.bn1", "0.bn2"]
    assert report.output == pytest.approx(expected.output, abs=0.02)


def test_a_gap_can_be_measured_where_gradients_are_off_or_tensors_are_inference_ones():
    model, batch = settle(ConvNet(), inputs(2)), labelled()
    expected = train_eval_gap(model, batch)[:6]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with unchanged(model), mode:
            assert train_eval_gap(model, batch)[:6] == expected
    assert not any(buffer.is_inference() for buffer in model.buffers())
    model(batch[0]).sum().backward()


LOSSES = {
    "classes": ((4, 3), torch.tensor([0, 2, 1, 0]), lambda o, t: F.cross_entropy(o, t)),
    "classes of few bits": (
        (4, 3),
        torch.tensor([0, 2, 1, 0], dtype=torch.uint8),
        lambda o, t: F.cross_entropy(o, t.long()),
    ),
    "pixels": ((4, 3, 2), torch.tensor([[0, 2]] * 4), lambda o, t: F.cross_entropy(o, t)),
    "regression": ((4, 3), torch.ones(4, 3), lambda o, t: F.mse_loss(o, t)),
    "regression in double": ((4, 3), torch.ones(4, 3).double(), lambda o, t: F.mse_loss(o, t.float())),
    "other regression": ((4, 3), torch.ones(4), None),
    "other classes": ((4, 3), torch.tensor([0, 3, 1, 0]), None),
    "ignored classes": ((4, 3), torch.tensor([0, -100, 1, 0]), None),
    "other number": ((4, 3), torch.tensor([0, 1]), None),
    "one logit": ((4, 1), torch.tensor([0, 1, 1, 0]), None),
    "truths": ((4, 3), torch.tensor([True] * 4), None),
    "no tensor": ((4, 3), "cat", None),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_known_where_batch_and_output_say_it(case):
    shape, target, loss = LOSSES[case]
    model, x = (
        nn.Sequential(nn.BatchNorm1d(math.prod(shape[1:])), nn.Unflatten(1, shape[1:])),
        torch.randn(4, *shape[1:]),
    )
    x = x.flatten(1) + 1
    report = train_eval_gap(model, (x, target))
    if loss is None:
        assert (report.loss, report.loss_batch, report.loss_running) == (None, None, None)
    else:
        assert report.loss_running == pytest.approx(loss(model.eval()(x), target).item())
        assert report.loss_batch == pytest.approx(loss(model.train()(x), target).item())
    assert (report.disagreement is None) == (shape[1] == 1)


def test_a_loss_of_ones_own_gets_output_and_batch():
    model, batch = settle(ConvNet(), inputs(2)), {"x": inputs(1)[0], "y": 2.0}
    report = train_eval_gap(
        model,
        batch,
        forward=lambda model, batch: {"scores": [model(batch["x"])], "name": "a"},
        loss=lambda output, batch: output["scores"][0].mean() * batch["y"],
    )
    with torch.no_grad():
        assert report.loss_running == pytest.approx(model.eval()(batch["x"]).mean().item() * 2)
    assert report.output > 0
    assert report.disagreement is None
    with pytest.raises(ValueError, match="must be one number"):
        train_eval_gap(model, labelled(), loss=lambda output, batch: output)


def test_an_output_without_floating_tensors_has_no_difference():
    model = ConvNet()
    report = train_eval_gap(model, labelled(), forward=lambda model, batch: model(batch[0]).argmax(1))
    assert (report.output, report.disagreement, report.loss) == (None, None, None)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_forward_that_fails_leaves_all_as_it_was(error, call):
    model, calls = ConvNet(dropout=0.5), []

    def forward(model, batch):
        noisy(model, batch)
        calls.append(batch)
        if len(calls) == call:
            raise error

    with unchanged(model), pytest.raises(type(error)):
        train_eval_gap(model, labelled(), forward=forward)


def test_what_cannot_be_probed_is_said():
    with pytest.raises(ValueError, match="has no BatchNorm layers"):
        train_eval_gap(nn.Linear(2, 2), torch.randn(4, 2))
    model = nn.Sequential(nn.BatchNorm1d(3))
    with unchanged(model), pytest.raises(ValueError, match="single value per channel"):
        train_eval_gap(model, torch.ones(1, 3))
    with unchanged(model), pytest.raises(TypeError, match="pass forward="):
        train_eval_gap(model, 3)


# dropout_variance_shift


def met_in_training(model, x):
    with torch.no_grad(), bnkit.observe(model.train()) as seen:
        model(x)
    return seen


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_shift_right_after_dropout_is_the_one_in_closed_form(p):
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(3))
    x = torch.randn(100_000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 3.0])
    seen = met_in_training(model, x)
    found = dropout_variance_shift(seen, train_eval_gap(model, x).seen)["1"]
    mean, var = population(x)
    # Inverted dropout: E[y²] = E[x²] / (1 - p), and the mean stays.
    expected = ((var + mean**2) / (1 - p) - mean**2) / var
    torch.testing.assert_close(found, expected.log(), rtol=0, atol=0.03)


def test_no_dropout_upstream_is_no_variance_shift():
    model, x = ConvNet(dropout=0.5), inputs(1, 64)[0]
    found = dropout_variance_shift(met_in_training(model, x), train_eval_gap(model, x).seen)
    assert found["bn1"].abs().max() < 1e-6
    assert found["bn2"].min() > 0.01


def test_a_variance_shift_takes_mean_and_variance_and_leaves_out_what_it_does_not_know():
    one = Moments(4, torch.zeros(2), torch.ones(2))
    found = dropout_variance_shift({"a": (torch.zeros(2), torch.ones(2) * 2), "b": one}, {"a": one, "c": one}, eps=1.0)
    assert list(found) == ["a"]
    assert found["a"].tolist() == pytest.approx([math.log(1.5)] * 2)
    with pytest.raises(ValueError, match="No layer was seen both"):
        dropout_variance_shift({"b": one}, {"c": one})


# internal_covariate_shift


class Deep(nn.Module):
    """Three layers as the probe cuts them, and a tail."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.linear2, self.bn2 = nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5)
        self.scale, self.linear3, self.bn3 = nn.PReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)
        self.drop, self.tail = nn.Dropout(dropout), nn.Linear(3, 2)

    def forward(self, x):
        x = self.drop(self.bn1(self.linear1(x)).tanh())
        x = self.scale(self.bn2(self.linear2(x)))
        return self.tail(self.bn3(self.linear3(x)).tanh())


def mean_square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def regression(dtype=torch.float32):
    return torch.randn(16, 4, dtype=dtype), torch.randn(16, 2, dtype=dtype)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stepped(model, batch, lr=0.5, loss=mean_square):
    """The weights before and after a step of gradient descent; the model is left before it."""
    before = copies(model)
    trained = copy.deepcopy(model)
    loss(trained, batch).backward()
    torch.optim.SGD(trained.parameters(), lr=lr).step()
    return before, copies(trained)


def test_the_shift_is_that_of_the_definition_computed_by_hand():
    model, batch = Deep().double(), regression(torch.float64)
    before, after = stepped(model, batch)
    with torch.no_grad():  # wherever the model is now, before and after say the weights
        for parameter in model.parameters():
            parameter.add_(1.0)
    with unchanged(model):
        found = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)
    layers = {"bn1": ("linear1", "bn1"), "bn2": ("linear2", "bn2"), "bn3": ("scale", "linear3", "bn3")}

    def gradient(weights, owners):
        """By the formulas, with no module: batch normalization by batch statistics written out."""
        w = {name: value.clone().requires_grad_() for name, value in weights.items()}

        def normalise(x, layer):
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
            return x * w[f"{layer}.weight"] + w[f"{layer}.bias"] if f"{layer}.weight" in w else x

        x = normalise(batch[0] @ w["linear1.weight"].T + w["linear1.bias"], "bn1").tanh()
        x = normalise(x @ w["linear2.weight"].T, "bn2")
        x = torch.where(x > 0, x, w["scale.weight"] * x)
        x = normalise(x @ w["linear3.weight"].T + w["linear3.bias"], "bn3").tanh()
        (x @ w["tail.weight"].T + w["tail.bias"] - batch[1]).square().mean().backward()
        return torch.cat([value.grad.flatten() for name, value in w.items() if name.split(".")[0] in owners])

    mixed, by_hand = dict(before), {}
    for name, owners in layers.items():
        g, g_after = gradient(before, owners), gradient(mixed, owners)
        by_hand[name] = ((g - g_after).norm().item(), F.cosine_similarity(g, g_after, dim=0).item())
        mixed |= {key: value for key, value in after.items() if key.split(".")[0] in owners}
    assert list(found) == list(layers)
    for name, expected in by_hand.items():
        assert found[name] == pytest.approx(expected, rel=1e-8, abs=1e-12), name
    assert found["bn2"].norm > 1e-4
    assert found["bn1"] == (0, 1)


@pytest.mark.parametrize("swap", [name for name in SWAPS if name != "group"])
def test_a_step_of_nothing_is_no_shift_and_nothing_changes(swap):
    model, batch = ConvNet(dropout=0.5), labelled()
    if SWAPS[swap] is not None:
        bnkit.swap(model, SWAPS[swap])

    def loss(model, batch):
        return F.cross_entropy(noisy(model, batch), batch[1])

    before, after = stepped(model, batch, lr=0.0, loss=loss)
    with unchanged(model):
        found = internal_covariate_shift(model, batch, before=before, after=after, loss=loss)
    assert set(found) == {"bn1", "bn2"}
    assert set(found.values()) == {(0, 1)}


def test_one_layer_probed_is_the_same_as_among_all():
    model, batch = Deep(dropout=0.5), regression()
    before, after = stepped(model, batch)
    probe = {"before": before, "after": after, "loss": mean_square}
    every = internal_covariate_shift(model, batch, **probe)
    assert internal_covariate_shift(model, batch, layers=["bn3"], **probe) == {"bn3": every["bn3"]}
    assert internal_covariate_shift(model, batch, layers=[], **probe) == {}
    with pytest.raises(ValueError, match=r"layers names \['bn9'\]"):
        internal_covariate_shift(model, batch, layers=["bn9"], **probe)


def test_each_layer_costs_one_backward_pass_and_the_first_none():
    model, batch, calls = Deep(), regression(), []
    before, after = stepped(model, batch)

    def loss(model, batch):
        calls.append(1)
        return mean_square(model, batch)

    internal_covariate_shift(model, batch, before=before, after=after, loss=loss)
    assert len(calls) == 3


def test_parameters_that_do_not_learn_stay_as_they_are():
    model, batch = Deep(), regression()
    model.linear1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    before, after = stepped(model, batch)
    for weights in (before, after):
        weights["linear1.weight"].fill_(math.nan)
    found = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)
    assert list(found) == ["bn2", "bn3"]
    assert found["bn2"].norm == 0  # nothing before it has changed
    assert found["bn3"].norm > 0


def test_a_layer_that_takes_no_part_in_the_loss_has_no_entry():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)
    found = internal_covariate_shift(
        model, batch, before=before, after=after, loss=lambda m, b: m.bn1(m.linear1(b[0])).square().sum()
    )
    assert list(found) == ["bn1"]


def test_a_parameter_that_is_used_twice_belongs_to_its_first_layer_and_moves_everywhere():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    batch = regression()
    before = copies(model)
    after = before | {"0.weight": before["0.weight"] + 1}
    with unchanged(model):
        found = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)

    def gradient(shared):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.copy_(shared)
        return torch.cat([g.flatten() for g in torch.autograd.grad(mean_square(twin, batch), [*twin[3].parameters()])])

    # The second Linear's bias has no gradient but rounding: BatchNorm takes it away.
    expected = (gradient(before["0.weight"]) - gradient(after["0.weight"])).norm().item()
    assert found["3"].norm == pytest.approx(expected, rel=1e-4)


def test_a_recurrent_network_below_sees_its_new_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.bn1 = nn.LSTM(4, 5, batch_first=True), nn.BatchNorm1d(5)
            self.linear, self.bn2 = nn.Linear(5, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.bn2(self.linear(self.bn1(self.lstm(x)[0][:, -1])))

    model, batch = Recurrent(), (torch.randn(8, 3, 4), torch.randn(8, 2))
    before, after = stepped(model, batch, lr=5.0)
    with unchanged(model):
        found = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)
    assert found["bn2"].norm > 1e-6


def test_the_models_own_parameters_may_be_the_weights_after_the_step():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)
    expected = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)
    model.load_state_dict(model.state_dict() | after)
    for own in (dict(model.named_parameters()), model.state_dict()):
        with unchanged(model):
            found = internal_covariate_shift(model, batch, before=before, after=own, loss=mean_square)
        assert found == expected


def test_a_compiled_model_has_the_shift_of_the_plain_one():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)
    expected = internal_covariate_shift(model, batch, before=before, after=after, loss=mean_square)
    compiled = torch.compile(model, backend="eager")
    compiled(batch[0])
    names = [{f"_orig_mod.{name}": value for name, value in w.items()} for w in (before, after)]
    with unchanged(model):
        found = internal_covariate_shift(compiled, batch, before=names[0], after=names[1], loss=mean_square)
    assert {name: tuple(s) for name, s in found.items()} == {name: pytest.approx(s) for name, s in expected.items()}


def test_autocast_and_modes_without_gradients_are_off_meanwhile():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)
    probe = {"before": before, "after": after, "loss": mean_square}
    expected = internal_covariate_shift(model, batch, **probe)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert internal_covariate_shift(model, batch, **probe) == expected


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_loss_that_fails_leaves_all_as_it_was(error, call):
    model, batch, calls = Deep(dropout=0.5), regression(), []
    before, after = stepped(model, batch)

    def loss(model, batch):
        value = mean_square(model, batch)
        calls.append(1)
        if len(calls) == call:
            raise error
        return value

    with torch.no_grad():
        model.tail.weight.add_(1.0)
    with unchanged(model), pytest.raises(type(error)):
        internal_covariate_shift(model, batch, before=before, after=after, loss=loss)


def test_weights_and_losses_that_do_not_fit_are_said():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)

    def probe(before=before, after=after, loss=mean_square):
        with unchanged(model):
            internal_covariate_shift(model, batch, before=before, after=after, loss=loss)

    with pytest.raises(ValueError, match=r"after lacks the parameters \['tail.weight', 'tail.bias'\]"):
        probe(after={name: value for name, value in after.items() if "tail" not in name})
    with pytest.raises(ValueError, match=r"before has 'tail.bias' in the shape \(3,\)"):
        probe(before=before | {"tail.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="same memory"):
        probe(after=before)
    with pytest.raises(ValueError, match="one number with a gradient"):
        probe(loss=lambda model, batch: mean_square(model, batch).item())
    with pytest.raises(ValueError, match="one number with a gradient"):
        probe(loss=lambda model, batch: model(batch[0]))


def test_names_are_chosen_evenly_and_the_last_is_among_them():
    names = [f"bn{i}" for i in range(10)]
    assert evenly(names, 1) == ["bn9"]
    assert evenly(names, 5) == ["bn1", "bn3", "bn5", "bn7", "bn9"]
    assert evenly(names, 10) == evenly(names, 99) == names
    assert evenly([], 3) == []
    with pytest.raises(ValueError, match="at least 1"):
        evenly(names, 0)


def test_a_gradient_of_zero_has_no_angle():
    model, batch = Deep(), regression()
    before, after = stepped(model, batch)
    found = internal_covariate_shift(
        model, batch, before=before, after=after, loss=lambda model, batch: mean_square(model, batch) * 0
    )
    assert all(shift.norm == 0 and math.isnan(shift.cosine) for shift in found.values())
    assert isinstance(found["bn1"], CovariateShift)
