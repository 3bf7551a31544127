"""What a step normalised, told from the running statistics alone, is what the layers' inputs say it was."""

import copy

import pytest
import torch
from helpers.references import ConvNet, inputs, population
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnkit
from bnkit import norms
from bnkit.layers import batch_norm_layers
from bnkit.monitoring.step_recorder import StepRecorder, why_not_recorded


def _record(model, batches, run=lambda model, x: model(x), capacity=64):
    """The steps as recovered, and each layer's Moments of the same steps, reduced from its input in float64."""
    layers = batch_norm_layers(model)
    recorder = StepRecorder(list(layers.values()), capacity)
    seen, before = [], []
    for x in batches:
        before.append([(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers.values()])
        recorder.before()
        with bnkit.observe(model, exact=True) as moments:
            run(model, x)
        recorder.after()
        seen.append([moments.get(name) for name in layers])
    return recorder, recorder.take(), seen, before


def _assert_recovered(recorder, steps, seen, before, rtol):
    for k, (row, old) in enumerate(zip(seen, before, strict=True)):
        parts = [torch.split(values[k], recorder.channels) for values in steps[:4]]
        for layer, (moments, (mean, var)) in enumerate(zip(row, old, strict=True)):
            assert torch.equal(parts[0][layer], mean)
            assert torch.equal(parts[1][layer], var)
            unbiased = moments.var * moments.count / (moments.count - 1)
            std = unbiased.sqrt()
            assert ((parts[2][layer] - moments.mean) / std).abs().max() < rtol * (1 + (moments.mean / std).abs().max())
            torch.testing.assert_close(parts[3][layer].double(), unbiased, rtol=rtol, atol=0)


MOMENTA = {"0.1": 0.1, "0.001": 0.001, "1.0": 1.0, "cumulative": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_each_steps_mean_and_unbiased_variance_are_recovered(momentum, dtype):
    model = ConvNet().to(dtype)
    for layer in batch_norm_layers(model).values():
        layer.momentum = MOMENTA[momentum]
    result = _record(model, [x.to(dtype) for x in inputs(12)])
    slack = {"0.1": 1, "0.001": 100, "1.0": 1, "cumulative": 3}[momentum]
    _assert_recovered(*result, rtol=slack * (1e-5 if dtype == torch.float32 else 1e-12))
    assert bool(result[1].known.all())
    assert bool((result[1].calls == 1).all())


def test_layers_of_different_momenta_are_told_apart():
    model = ConvNet()
    model.bn1.momentum, model.bn2.momentum = None, 0.3
    _assert_recovered(*_record(model, inputs(6)), rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (9, 3)),
        (nn.BatchNorm1d, (9, 3, 5)),
        (nn.BatchNorm2d, (5, 3, 4, 4)),
        (nn.BatchNorm3d, (4, 3, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_layers_of_all_ranks_are_recovered(layer, shape, affine):
    _assert_recovered(
        *_record(nn.Sequential(layer(3, affine=affine)), [torch.randn(shape) for _ in range(4)]), rtol=1e-5
    )


@pytest.mark.parametrize(
    "spec", [norms.Ghost(2), norms.Ghost(3, "contiguous"), norms.Renorm(), norms.Domain(("a", "b")), norms.Sync()]
)
def test_variants_with_batch_statistics_tell_the_whole_batch(spec):
    model = ConvNet()
    bnkit.swap(model, spec)
    _assert_recovered(*_record(model, inputs(5)), rtol=1e-5)


def test_a_momentum_that_changes_every_step_is_followed():
    model = ConvNet()

    def run(model, x):
        model(x)
        model.bn1.momentum *= 0.7  # after the forward, for the next step

    recorder, steps, seen, before = _record(model, inputs(6), run)
    _assert_recovered(recorder, steps, seen, before, rtol=1e-4)


def test_several_calls_are_averaged_with_the_weights_of_the_running_average():
    layer = nn.BatchNorm1d(3, momentum=0.2).double()
    recorder = StepRecorder([layer], 4)
    calls = [torch.randn(9, 3, dtype=torch.float64) + shift for shift in (0, 1, 5)]
    recorder.before()
    for x in calls:
        layer(x)
    recorder.after()
    steps = recorder.take()
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    means = torch.stack([x.mean(0) for x in calls])
    torch.testing.assert_close(steps.mean[0], weights @ means / weights.sum())
    assert steps.calls.tolist() == [[3]]


class _Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_a_checkpointed_layer_that_is_updated_twice_by_the_same_batch_gives_that_batch():
    model = _Checkpointed()
    result = _record(model, inputs(5), lambda model, x: model(x).sum().backward())
    assert result[1].calls.flatten().tolist() == [2] * 5
    _assert_recovered(*result, rtol=1e-5)


def test_a_step_in_which_a_layer_takes_no_part_is_unknown_for_that_layer_alone():
    model = nn.ModuleDict({"always": nn.BatchNorm1d(3), "seldom": nn.BatchNorm1d(2)})
    recorder = StepRecorder(list(model.values()), 8)
    for step in range(6):
        recorder.before()
        model["always"](torch.randn(8, 3))
        if step % 2:
            model["seldom"](torch.randn(8, 2))
        recorder.after()
    steps = recorder.take()
    assert steps.known.tolist() == [[True, bool(step % 2)] for step in range(6)]
    assert steps.mean[:, :3].isfinite().all()
    assert steps.mean[0::2, 3:].isnan().all()
    assert steps.mean[1::2, 3:].isfinite().all()


def test_replaced_buffers_make_that_layer_unknown_and_no_other():
    model = ConvNet()
    recorder = StepRecorder([model.bn1, model.bn2], 8)
    for step, x in enumerate(inputs(4)):
        recorder.before()
        if step == 2:
            model.bn1.running_mean = model.bn1.running_mean.clone()
        model(x)
        recorder.after()
    assert not recorder.is_current
    steps = recorder.take()
    assert not steps.known[:, 0].any()
    assert steps.known[:, 1].all()
    assert steps.mean[:, :6].isnan().all()
    assert steps.mean[:, 6:].isfinite().all()


def test_statistics_written_between_the_steps_are_where_the_next_step_begins():
    model = ConvNet()
    layers = (model.bn1, model.bn2)
    recorder, x = StepRecorder(layers, 8), inputs(2)
    for batch in x:
        for layer in layers:
            layer.reset_running_stats()
        recorder.before()
        model(batch)
        recorder.after()
    mean, _ = population(model.conv1(x[1]))
    steps = recorder.take()
    torch.testing.assert_close(steps.mean[1, :6].double(), mean, rtol=1e-4, atol=1e-6)


def test_the_batch_after_a_thousand_cumulative_steps_is_still_known_and_after_a_million_is_not():
    for count, known in ((1_000, True), (1_000_000, False)):
        layer = nn.BatchNorm1d(3, momentum=None)
        layer.num_batches_tracked.fill_(count)
        recorder = StepRecorder([layer], 2)
        recorder.before()
        layer(torch.randn(64, 3))
        recorder.after()
        assert recorder.take().known.item() is known


def test_a_step_whose_beginning_nobody_saw_is_unknown():
    model = ConvNet()
    recorder = StepRecorder([model.bn1, model.bn2], 8)
    for x in inputs(3):
        model(x)
        recorder.after()
    assert not recorder.take().known.any()


def test_a_second_before_replaces_the_first():
    layer = nn.BatchNorm1d(3)
    recorder = StepRecorder([layer], 8)
    recorder.before()
    layer(torch.randn(8, 3) + 9)  # a step that was begun and given up
    x = torch.randn(8, 3)
    recorder.before()
    layer(x)
    recorder.after()
    torch.testing.assert_close(recorder.take().mean[0], x.mean(0), rtol=1e-4, atol=1e-5)


def test_a_take_in_the_middle_of_a_step_loses_nothing_of_it():
    layer = nn.BatchNorm1d(3)
    recorder = StepRecorder([layer], 8)
    batches = [torch.randn(8, 3) + step for step in range(5)]
    found = []
    for step, x in enumerate(batches):
        recorder.before()
        if step == 3:
            found.append(recorder.take())  # somebody saves a checkpoint
        layer(x)
        recorder.after()
    found.append(recorder.take())
    means = torch.cat([steps.mean for steps in found])
    torch.testing.assert_close(means, torch.stack([x.mean(0) for x in batches]), rtol=1e-4, atol=1e-5)
    assert all(bool(steps.known.all()) for steps in found)


def test_take_is_due_when_the_room_is_used_and_forgets():
    model = ConvNet()
    recorder = StepRecorder([model.bn1], 3)
    for expected in (False, False, True):
        recorder.before()
        assert recorder.after() is expected
    assert len(recorder.take().mean) == 3
    assert recorder.recorded == 0


def test_many_channels_get_less_room():
    layer = nn.BatchNorm1d(2**18)
    assert StepRecorder([layer], 64).capacity == 2
    assert StepRecorder([nn.BatchNorm1d(1)], 64).capacity == 64


def _swapped(spec):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    bnkit.swap(model, spec)
    return model[1]


class _Own(nn.BatchNorm2d):
    def forward(self, x):
        return x


def _frozen_by_lightning():
    layer = nn.BatchNorm2d(4)
    layer.track_running_stats = False
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.BatchNorm2d(4), None),
        (lambda: nn.SyncBatchNorm(4), None),
        (lambda: nn.BatchNorm2d(4, momentum=None), None),
        (lambda: nn.BatchNorm2d(4).eval(), "evaluation"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (_frozen_by_lightning, "track_running_stats"),
        (lambda: nn.BatchNorm2d(4, momentum=0.0), "momentum is 0"),
        (lambda: nn.BatchNorm2d(4, momentum=1e-7), "momentum is 1e-07"),
        (lambda: nn.BatchNorm2d(4).half(), "float16"),
        (lambda: nn.BatchNorm2d(4).bfloat16(), "bfloat16"),
        (lambda: _Own(4), "forward of its own"),
        (lambda: _swapped(norms.Ghost(2)), None),
        (lambda: _swapped(norms.MovingAverage()), None),
        (lambda: _swapped(norms.Frozen()), "Frozen"),
        (lambda: _swapped(norms.Group(2)), "Group"),
    ],
)
def test_a_layer_whose_running_statistics_tell_nothing_says_why(layer, reason):
    why = why_not_recorded(layer())
    assert why is None if reason is None else reason in why


def test_a_copy_of_the_model_does_not_disturb_the_record():
    model = ConvNet()
    recorder = StepRecorder([model.bn1, model.bn2], 8)
    twin = copy.deepcopy(model)
    recorder.before()
    twin(inputs(1)[0])
    recorder.after()
    assert recorder.take().calls.tolist() == [[0, 0]]
