import copy

import pytest
import torch
from torch import nn

from bnkit.norms import Renorm


def renorm(*args, **settings):
    layer = nn.BatchNorm2d(3, dtype=torch.float64, **settings)
    layer.running_mean.copy_(torch.tensor([0.2, -0.1, 0.4]))
    layer.running_var.copy_(torch.tensor([0.8, 1.3, 1.0]))
    Renorm(*args).apply(layer)
    return layer


def test_training_begins_as_batchnorm():
    layer = renorm(3.0, 5.0, 100)
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 3 + 2
    torch.testing.assert_close(layer(x), plain(x))


def test_unclipped_it_is_inference_by_the_statistics_before_the_batch():
    layer = renorm(1e6, 1e6, 0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 3 + 2
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)


def test_the_bounds_grow_linearly_with_the_step():
    layer = renorm(3.0, 4.0, 10, momentum=0.0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 100 + 5000  # both corrections at their bounds
    dims = (0, 2, 3)
    for step in range(14):
        assert layer.step == step
        done = min(step / 10, 1)
        output = layer(x)
        torch.testing.assert_close(output.mean(dims), torch.full((3,), 4.0 * done, dtype=torch.float64))
        torch.testing.assert_close(
            output.std(dims, correction=0), torch.full((3,), 1 + 2.0 * done, dtype=torch.float64), rtol=1e-6, atol=0
        )


def test_the_step_can_be_kept_and_set_beside_the_state_dict():
    first, second = renorm(3.0, 5.0, 10), renorm(3.0, 5.0, 10)
    batches = [torch.randn(8, 3, 4, 4, dtype=torch.float64) * 2 for _ in range(6)]
    for batch in batches[:5]:
        first(batch)
    assert "_renorm_step" not in first.state_dict()
    second.load_state_dict(first.state_dict())
    second.step = first.step
    assert torch.equal(first(batches[5]), second(batches[5]))
    assert second.step == 6


def test_inference_does_not_count_as_a_step():
    layer = renorm(3.0, 5.0, 10)
    layer.eval()(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert layer.step == 0


def test_no_gradient_passes_through_the_corrections():
    layer = renorm(2.0, 1.0, 0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    layer(x).backward(upstream)
    # BatchNorm's gradient, times r: orthogonal to a shift of the batch.
    torch.testing.assert_close(x.grad.sum((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_single_value_is_refused_and_counts_for_nothing():
    layer = nn.BatchNorm1d(3)
    Renorm().apply(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert layer.step == 0
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_max": 0.5}, "r_max is a factor of at least 1"),
        ({"r_max": float("nan")}, "r_max is a factor of at least 1"),
        ({"d_max": -1.0}, "d_max is a number of standard deviations"),
        ({"warmup_steps": -1}, "warmup_steps is an int"),
        ({"warmup_steps": 1.5}, "warmup_steps is an int"),
    ],
)
def test_a_bad_value_is_said_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        Renorm(**settings)
