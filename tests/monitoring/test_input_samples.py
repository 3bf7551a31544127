"""Layers without batch statistics of their own: their inputs, by hooks that are gone afterwards."""

import pytest
import torch
from helpers.references import ConvNet, assert_same, inputs, population, snapshot

from bnkit import Moments
from bnkit.monitoring.input_samples import InputSampler, nonfinite_since, stale_statistics
from bnkit.shift import shift


def _sampled(model, batches, sampler):
    for at, x in enumerate(batches):
        sampler.open(at)
        model(x)
        sampler.close()


def test_a_sample_is_the_input_against_the_running_statistics_before_the_step():
    model, x = ConvNet(), inputs(1)[0]
    mean, var = population(model.conv1(x))
    values = x.shape[0] * 36
    expected = shift(Moments(values, mean, var * values / (values - 1)), Moments(1, torch.zeros(6), torch.ones(6)))
    sampler = InputSampler({"bn1": model.bn1})  # in training mode: the step moves the running statistics
    _sampled(model, [x], sampler)
    sample = sampler.samples["bn1"][0]
    torch.testing.assert_close(sample.shift.mean, expected.mean)
    torch.testing.assert_close(sample.shift.variance_ratio, expected.variance_ratio)
    assert sample.at == 0


def test_several_calls_in_one_step_are_pooled():
    model, (x, y) = ConvNet().eval(), inputs(2)
    sampler = InputSampler({"bn1": model.bn1})
    sampler.open(0)
    model(x)
    model(y)
    sampler.close()
    mean, _ = population(model.conv1(torch.cat([x, y])))
    torch.testing.assert_close(sampler.samples["bn1"][0].shift.mean, mean / (1 + 1e-5) ** 0.5)


def test_the_model_is_left_as_it_was_also_by_an_exception():
    model = ConvNet().eval()
    before = snapshot(model)
    sampler = InputSampler({"bn1": model.bn1, "bn2": model.bn2})
    sampler.open(0)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 99, 8, 8))
    sampler.open(0)
    model(inputs(1)[0])
    sampler.close()
    assert_same(before, snapshot(model))
    sampler.close()
    assert len(sampler.samples["bn1"]) == 1, "closing twice takes no sample twice"


def test_a_step_that_was_given_up_leaves_no_sample():
    model = ConvNet().eval()
    sampler = InputSampler({"bn1": model.bn1})
    sampler.open(0)
    model(inputs(1, offset=99)[0])
    sampler.open(0)
    sampler.close()
    assert sampler.samples["bn1"] == []


def test_samples_against_other_running_statistics_are_forgotten():
    model = ConvNet().eval()
    sampler = InputSampler({"bn1": model.bn1})
    _sampled(model, inputs(4, offset=3.0), sampler)
    model.bn1.running_mean += 1  # recalibrated
    _sampled(model, inputs(2), sampler)
    sampler.forget_outdated()
    assert len(sampler.samples["bn1"]) == 2


def test_only_the_last_samples_are_kept():
    model = ConvNet().eval()
    sampler = InputSampler({"bn1": model.bn1}, keep=3)
    _sampled(model, inputs(5), sampler)
    assert [sample.at for sample in sampler.samples["bn1"]] == [2, 3, 4]


def test_a_restored_sampler_has_the_same_samples():
    model = ConvNet().eval()
    one, other = (InputSampler({"bn1": model.bn1}) for _ in range(2))
    _sampled(model, inputs(3), one)
    other.restore(one.state())
    for a, b in zip(one.samples["bn1"], other.samples["bn1"], strict=True):
        assert torch.equal(a.shift.mean, b.shift.mean)
        assert torch.equal(a.shift.variance_ratio, b.shift.variance_ratio)
        assert torch.equal(a.dead, b.dead)
        assert torch.equal(a.reference, b.reference)
        assert a.at == b.at


def test_one_nan_batch_is_told_and_does_not_hide_that_the_statistics_are_stale():
    model = ConvNet().eval()
    sampler = InputSampler({"bn1": model.bn1})
    batches = inputs(10, offset=9.0)
    batches[4][:] = torch.nan
    _sampled(model, batches, sampler)
    assert nonfinite_since(sampler.samples, 0) == {"bn1": 4}
    assert nonfinite_since(sampler.samples, 5) == {}
    assert list(stale_statistics(sampler.samples, 1e-4)) == ["bn1"]
