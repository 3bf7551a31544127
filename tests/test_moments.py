import pytest
import torch
from helpers.references import population
from hypothesis import given, settings
from hypothesis import strategies as st

from bnkit import Moments
from bnkit import moments as moments_module


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (5, 3, 4, 2), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_of_any_rank_is_the_float64_reduction(shape, dtype):
    x = (torch.randn(shape) * 5 + 3).to(dtype)
    mean, var = population(x)
    moments = Moments.of(x)
    assert moments.count == x.numel() / 3
    assert moments.mean.dtype == moments.var.dtype == moments.count.dtype == torch.float64
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moments.var, var, rtol=1e-12, atol=0)


def test_of_another_channel_dim():
    x = torch.randn(4, 5, 6)
    mean, var = population(x, channel_dim=-1)
    moments = Moments.of(x, channel_dim=-1)
    torch.testing.assert_close((moments.mean, moments.var), (mean, var))


def test_of_slices_is_of_the_whole(monkeypatch):
    x = torch.randn(50, 3, 4)
    whole = Moments.of(x)
    monkeypatch.setattr(moments_module, "_SLICE_ELEMENTS", 40)
    sliced = Moments.of(x)
    torch.testing.assert_close((sliced.mean, sliced.var), (whole.mean, whole.var), rtol=1e-12, atol=1e-14)
    assert sliced.batches == 1, "slices are no batches"


@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3, 1e4])
def test_without_float64_on_the_device_the_error_stays_small(monkeypatch, ratio):
    monkeypatch.setattr(moments_module, "_has_float64", lambda device: False)
    x = torch.randn(512, 4, 8) * 0.1 + 0.1 * ratio
    mean, var = population(x)
    moments = Moments.of(x)
    torch.testing.assert_close(moments.var, var, rtol=1e-5, atol=0)
    assert ((moments.mean - mean).abs() / var.sqrt()).max() < 1e-5


@st.composite
def _parts(draw):
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    offset = draw(st.sampled_from([0.0, 1.0, 1e5]))
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return [scale * (torch.randn(size, 3, dtype=torch.float64, generator=generator) + offset) for size in sizes]


@given(_parts())
@settings(max_examples=100, deadline=None)
def test_pooling_parts_is_taking_the_whole(parts):
    pooled = Moments.pool([Moments.of(part) for part in parts])
    mean, var = population(torch.cat(parts))
    assert pooled.count == sum(map(len, parts))
    assert pooled.batches == sum(len(part) > 0 for part in parts)
    assert (pooled.var >= 0).all()
    torch.testing.assert_close(pooled.mean, mean, rtol=1e-11, atol=0)
    torch.testing.assert_close(pooled.var, var, rtol=1e-9, atol=float(mean.abs().max()) ** 2 * 1e-20)


@given(_parts())
@settings(max_examples=50, deadline=None)
def test_adding_one_by_one_is_pooling_at_once(parts):
    moments = [Moments.of(part) for part in parts]
    at_once = Moments.pool(moments)
    total = Moments.empty(3)
    for part in moments:
        total = total + part
    for a, b in zip(at_once._packed(), total._packed(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=float(at_once.mean.abs().max()) ** 2 * 1e-18 + 1e-300)


def test_an_empty_part_is_the_neutral_element_whatever_its_mean_says():
    moments = Moments.of(torch.randn(9, 2))
    nothing = Moments(torch.tensor(0.0), torch.full((2,), torch.nan), torch.full((2,), torch.nan))
    total = nothing + moments + nothing
    assert torch.equal(total._packed(), moments._packed())


def test_cat_and_split_undo_each_other():
    parts = [Moments.of(torch.randn(9, 2)), Moments.empty(3), Moments.of(torch.randn(4, 1, 5))]
    again = Moments.cat(parts).split([2, 3, 1])
    for a, b in zip(parts, again, strict=True):
        assert a.count.shape == b.count.shape == ()
        assert torch.equal(a._packed(), b._packed())


def test_layers_in_a_row_pool_as_each_by_itself():
    first, second = ([Moments.of(torch.randn(n, 2)), Moments.of(torch.randn(n + 1, 3))] for n in (4, 7))
    together = (Moments.cat(first) + Moments.cat(second)).split([2, 3])
    for one, a, b in zip(together, first, second, strict=True):
        torch.testing.assert_close(one._packed(), (a + b)._packed(), rtol=1e-14, atol=0)


def test_standard_error_of_independent_batches_is_the_spread_of_their_mean():
    # 400 repetitions of 10 batches of 16 images whose 9 pixels are all alike: 9 times fewer independent values.
    means, errors = [], []
    for _ in range(400):
        batches = torch.randn(10, 16, 1, 1).expand(-1, -1, -1, 9)
        pooled = Moments.pool([Moments.of(batch) for batch in batches])
        means.append(pooled.mean)
        errors.append(pooled.standard_error)
    truth = 1 / 160**0.5
    assert torch.stack(means).std() == pytest.approx(truth, rel=0.15)
    assert torch.stack(errors).mean() == pytest.approx(truth, rel=0.1)


def test_standard_error_of_one_batch_is_unknown():
    assert torch.isinf(Moments.of(torch.randn(9, 2)).standard_error).all()
    assert torch.isinf(Moments.empty(2).standard_error).all()


def test_an_overflowing_value_is_kept_visible():
    assert not Moments.of(torch.tensor([[1.0], [torch.nan]])).mean.isfinite().any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Moments.of(torch.randn(3)), "two dimensions"),
        (lambda: Moments.of(torch.randn(3, 2, dtype=torch.complex64)), "real"),
        (lambda: Moments.pool([]), "at least one part"),
        (lambda: Moments.pool([Moments.empty(2), Moments.empty(3)]), "one number of channels"),
        (lambda: Moments(torch.tensor(1.0), torch.zeros(2), torch.zeros(3)), "one shape"),
        (lambda: Moments(torch.tensor(1.0), torch.zeros(2), -torch.ones(2)), "not negative"),
        (lambda: Moments(torch.tensor(-1.0), torch.zeros(2), torch.ones(2)), "not negative"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
