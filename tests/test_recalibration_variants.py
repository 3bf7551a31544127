"""Recalibration and observation of a model that holds bnkit's own variants."""

import copy

import pytest
import torch
from helpers.references import ConvNet, assert_population, assert_same, inputs, population, snapshot

import bnkit
from bnkit import norms

VARIANTS = {
    "ghost": norms.Ghost(4),
    "contiguous ghost": norms.Ghost(4, grouping="contiguous"),
    "sync": norms.Sync(),
    "renorm": norms.Renorm(),
    "domain": norms.Domain(["a", "b"]),
}


def _swapped(spec):
    model = ConvNet()
    for _ in range(3):  # statistics that are not the initial ones, which renorm normalises by
        model(inputs(1)[0])
    for layer in (model.bn1, model.bn2):
        spec.apply(layer)
    return model


@pytest.mark.parametrize("consistency", ["batch", "population"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_variant_gets_the_population_of_what_it_normalised(kind, consistency):
    model, data = _swapped(VARIANTS[kind]), inputs()
    seen = []
    model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = snapshot(model)
    report = bnkit.recalibrate(model, data, consistency=consistency)
    assert list(report.layers) == ["bn1", "bn2"]
    assert_same(before, snapshot(model), except_running=["bn1", "bn2"])
    assert_population(model.bn1, model.conv1(torch.cat(data)))
    assert_population(model.bn2, torch.cat(seen[-len(data) :]))


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind != "renorm"])
def test_upstream_a_variant_normalises_as_in_training(kind):
    model, data = _swapped(VARIANTS[kind]), inputs(1)
    training = copy.deepcopy(model)
    expected, seen = [], []
    training.bn2.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        training(data[0])
    bnkit.recalibrate(model, data)
    torch.testing.assert_close(seen[0], expected[0])


@pytest.mark.parametrize("spec", [norms.Frozen(), norms.Group(2)])
def test_what_holds_its_statistics_keeps_them_and_is_named(spec):
    model = _swapped(spec)
    before = snapshot(model)
    assert set(bnkit.recalibrate(model, inputs()).kept) == {"bn1", "bn2"}
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("make", [lambda: norms.Renorm(), lambda: norms.MovingAverage(center_weights=False)])
def test_statistics_that_training_normalises_by_are_calibrated_layer_by_layer(make):
    model, data = _swapped(make()), inputs()
    reference = copy.deepcopy(model)
    report = bnkit.recalibrate(model, data)
    assert report.passes == 2
    bnkit.recalibrate(reference, data, consistency="population")
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


def test_moving_average_remembers_the_second_moment():
    model, data = ConvNet(), inputs()
    for conv, layer in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
        norms.MovingAverage().apply(layer, norms.Context(convolution=conv))
    with torch.no_grad():
        mean, var = population(model.conv1(torch.cat(data)))
    bnkit.recalibrate(model, data)
    assert not model.bn1.running_mean.any()
    torch.testing.assert_close(model.bn1.running_var.double(), var + mean**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_variant_is_observed(kind):
    model, data = _swapped(VARIANTS[kind]), inputs(1)
    with bnkit.observe(model) as seen:
        model(data[0])
    mean, var = population(model.conv1(data[0]))
    torch.testing.assert_close((seen["bn1"].mean, seen["bn1"].var), (mean, var), rtol=1e-6, atol=1e-7)
