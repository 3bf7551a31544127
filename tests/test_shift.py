import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

import bnkit
from bnkit import Moments
from bnkit.shift import (
    Shift,
    affine_magnitude,
    all_finite,
    batch_noise,
    dead_channels,
    kl_divergence,
    log_variance_ratio,
    mean_shift,
    normalization_batch_size,
    psi,
    relu_zero_fraction,
    shift,
    wasserstein2,
)

# (mean, variance) of what was observed and of the reference
PAIRS = [((0.0, 1.0), (0.0, 1.0)), ((1.5, 4.0), (-0.5, 1.0)), ((0.2, 0.09), (0.3, 0.25)), ((-3.0, 1.0), (1.0, 2.0))]
EPS = 0.01

mean = st.floats(-1e3, 1e3)
variance = st.floats(1e-4, 1e4)
normal = st.tuples(mean, variance)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def one(mean, var):
    return Moments(8, float64(mean), float64(var))


def density(pair, eps=EPS):
    """The normal distribution that the measures with eps are of: of the mean, and of the variance and eps."""
    return stats.norm(pair[0], math.sqrt(pair[1] + eps))


def integral(function, *distributions):
    ends = [end for d in distributions for end in (d.mean() - 14 * d.std(), d.mean() + 14 * d.std())]
    middle = sorted(d.mean() for d in distributions)
    return integrate.quad(function, min(ends), max(ends), points=middle, limit=500, epsabs=1e-12)[0]


@pytest.mark.parametrize(("observed", "reference"), PAIRS)
def test_the_kl_divergence_is_the_integral_that_defines_it(observed, reference):
    p, q = density(observed), density(reference)
    expected = integral(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), p)
    assert kl_divergence(one(*observed), one(*reference), EPS).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("observed", "reference"), PAIRS)
def test_the_population_stability_index_is_the_integral_that_defines_it(observed, reference):
    p, q = density(observed), density(reference)
    expected = integral(lambda x: (p.pdf(x) - q.pdf(x)) * (p.logpdf(x) - q.logpdf(x)), p, q)
    assert psi(one(*observed), one(*reference), EPS).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("observed", "reference"), PAIRS)
def test_the_wasserstein_distance_is_that_of_the_quantile_functions(observed, reference):
    p, q = density(observed, 0), density(reference, 0)
    square = integrate.quad(lambda u: (p.ppf(u) - q.ppf(u)) ** 2, 0, 1, limit=500)[0]
    assert wasserstein2(one(*observed), one(*reference)).item() == pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("observed", "reference"), PAIRS)
def test_the_standardized_wasserstein_distance_is_that_of_what_the_reference_normalises(observed, reference):
    unit = math.sqrt(reference[1] + EPS)
    p, q = density(observed), density(reference)
    square = integrate.quad(lambda u: ((p.ppf(u) - q.ppf(u)) / unit) ** 2, 0, 1, limit=500)[0]
    value = shift(one(*observed), one(*reference), EPS).wasserstein2.item()
    assert value == pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_the_shift_is_what_a_layers_output_shows(training):
    layer = nn.BatchNorm2d(3, affine=False).double()
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.25, 1e-6]))
    reference = Moments(1, layer.running_mean.clone(), layer.running_var.clone())
    x = torch.randn(16, 3, 4, 4).double() * 0.3 + 0.7
    layer.train(training)
    with bnkit.observe(layer) as seen:
        layer(x)
    output = Moments.of(layer.eval()(x)) if not training else None
    found = shift(seen[""], reference, layer.eps)
    exact = Moments.of(x)
    torch.testing.assert_close(found.mean, (exact.mean - reference.mean) / (reference.var + layer.eps).sqrt())
    if output is not None:  # what inference leaves of the batch's mean and variance
        torch.testing.assert_close(output.mean, found.mean)
        torch.testing.assert_close(output.var + layer.eps / (reference.var + layer.eps), found.variance_ratio)


def test_a_measure_is_the_shifts_property_of_its_name():
    observed, reference = one(1.5, 4.0), one(-0.5, 1.0)
    both = shift(observed, reference, EPS)
    assert mean_shift(observed, reference, EPS).equal(both.mean)
    assert log_variance_ratio(observed, reference, EPS).item() == pytest.approx(math.log(4.01 / 1.01))
    assert both.mean.item() == pytest.approx(2 / math.sqrt(1.01))


@given(normal, normal)
@settings(deadline=None)
def test_divergences_are_not_negative_and_psi_is_both_kl(p, q):
    forth, back = (kl_divergence(one(*a), one(*b), 0).item() for a, b in ((p, q), (q, p)))
    assert forth >= 0
    assert back >= 0
    index = psi(one(*p), one(*q), 0).item()
    assert index == pytest.approx(forth + back, rel=1e-9, abs=1e-15)
    assert index == pytest.approx(psi(one(*q), one(*p), 0).item(), rel=1e-9, abs=1e-15)


@given(normal, normal, normal)
@settings(deadline=None)
def test_the_wasserstein_distance_is_a_metric(p, q, r):
    def distance(a, b):
        return wasserstein2(one(*a), one(*b)).item()

    assert distance(p, p) == 0
    assert distance(p, q) == distance(q, p)
    assert distance(p, r) <= (distance(p, q) + distance(q, r)) * (1 + 1e-12)


@given(normal)
@settings(deadline=None)
def test_equal_distributions_have_no_shift(p):
    none = shift(one(*p), one(*p))
    assert [none.mean.item(), none.log_variance_ratio.item(), none.kl.item(), none.psi.item()] == [0, 0, 0, 0]
    assert none.wasserstein2.item() == 0


# So few digits that an affine map of them, by a power of two and a whole number, is exact.
short = st.tuples(st.integers(-800, 800).map(lambda n: n / 8), st.integers(1, 1000).map(lambda n: n / 16))


@given(short, short, st.integers(-6, 6), st.integers(-100, 100), st.sampled_from([-1, 1]))
@settings(deadline=None)
def test_an_affine_map_of_both_changes_no_divergence(p, q, power, offset, sign):
    scale = 2.0**power

    def mapped(pair):
        return one(sign * scale * pair[0] + offset, scale**2 * pair[1])

    plain, moved = shift(one(*p), one(*q), 0), shift(mapped(p), mapped(q), 0)
    assert moved.mean.item() == sign * plain.mean.item()
    for name in ("kl", "psi", "wasserstein2", "log_variance_ratio"):
        assert getattr(moved, name).item() == getattr(plain, name).item(), name
    assert wasserstein2(mapped(p), mapped(q)).item() == scale * wasserstein2(one(*p), one(*q)).item()


@pytest.mark.parametrize("excess", [0.0, 1e-15, -1e-12, 1e-9, -1e-5, 1e-3, -0.05, 0.099, 0.101, -0.1, 0.5, -0.9])
def test_divergences_keep_their_digits_where_the_variances_nearly_agree(excess):
    r = 1 + excess
    t = r - 1
    expected = math.fsum((-1) ** k * t**k / k for k in range(2, 200)) if abs(t) < 0.3 else t - math.log(r)
    close = Shift(float64(0.0), float64(r))
    assert close.kl.item() == pytest.approx(expected / 2, rel=1e-13, abs=0)
    assert close.psi.item() == pytest.approx(t * t / r / 2, rel=1e-13, abs=0)
    assert close.wasserstein2.item() == pytest.approx(abs(t) / (1 + math.sqrt(r)), rel=1e-13, abs=0)


def test_huge_shifts_stay_numbers_and_what_is_infinite_is_infinity():
    huge = Shift(float64(0.0, 1e100), float64(1e300, 1.0))
    torch.testing.assert_close(huge.kl, float64(5e299, 5e199))
    torch.testing.assert_close(huge.psi, float64(5e299, 1e200))
    torch.testing.assert_close(huge.wasserstein2, float64(1e150, 1e100))
    varying, constant = one(0.0, 1.0), one(0.0, 0.0)
    assert shift(varying, constant, 0).wasserstein2.isposinf()
    for observed, reference in ((varying, constant), (constant, varying)):
        assert kl_divergence(observed, reference, 0).isposinf()
        assert psi(observed, reference, 0).isposinf()


def test_a_shift_may_have_any_shape():
    stacked = Shift(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.5)
    for value in (stacked.kl, stacked.psi, stacked.wasserstein2, stacked.log_variance_ratio):
        assert value.shape == (2, 3, 4)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="one number of channels, not 1 and 2"):
        kl_divergence(one(0.0, 1.0), Moments(1, torch.zeros(2), torch.ones(2)))
    with pytest.raises(ValueError, match="eps is a variance"):
        shift(one(0.0, 1.0), one(0.0, 1.0), -1e-5)
    with pytest.raises(ValueError, match="must be positive"):
        normalization_batch_size(torch.ones(1), samples=0, level=0.1)


def test_the_relu_fraction_is_the_normal_distributions_mass_below_zero():
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    bias = torch.tensor([0.0, 1.0, -2.0, 30.0]).double()
    expected = stats.norm.cdf(-bias.numpy() / np.abs(weight.numpy()))
    np.testing.assert_allclose(relu_zero_fraction(weight, bias).numpy(), expected, rtol=1e-10)


def test_the_relu_fraction_is_what_a_layer_and_a_relu_give():
    layer = nn.BatchNorm1d(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.3, -0.5, 1.0]))
    zeros = (layer(torch.randn(200_000, 3).double() * 7 + 5).relu() == 0).double().mean(0)
    torch.testing.assert_close(relu_zero_fraction(layer.weight, layer.bias), zeros, rtol=0, atol=0.005)


def test_a_constant_channel_is_all_zeros_or_none_after_a_relu():
    fraction = relu_zero_fraction(torch.zeros(4), torch.tensor([-1.0, 0.0, 1.0, math.nan]))
    assert fraction[:3].tolist() == [1, 1, 0]
    assert fraction[3].isnan()


def test_dead_channels_are_those_that_a_layer_and_a_relu_leave_constant():
    layer = nn.BatchNorm1d(6).double()
    scale = torch.tensor([1.0, 1.0, 1.0, 1e-6, 1.0, 0.0])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -8.0, 0.0, 8.0, 1.0]))
    x = torch.randn(2000, 6).double() * scale
    spread = layer(x).relu().std(0)
    dead = dead_channels(Moments.of(x), layer.weight, layer.bias, layer.eps)
    assert dead.tolist() == [False, True, True, True, False, True]
    assert dead.tolist() == (spread < 1e-3).tolist()


def test_a_layer_without_variance_is_dead_but_one_that_was_not_seen_is_not_known_to_be():
    constant = Moments(8, torch.ones(2), torch.zeros(2))
    assert dead_channels(constant, None, None, eps=0).all()
    assert not dead_channels(Moments.empty(2), None, None).any()
    assert not dead_channels(Moments(8, torch.ones(1), torch.tensor([math.nan])), None, None).any()


def test_affine_magnitudes_are_root_mean_squares():
    weight, bias = torch.randn(7), torch.randn(7)
    found = affine_magnitude(weight, bias)
    assert found == pytest.approx([np.sqrt(np.mean(v.double().numpy() ** 2)) for v in (weight, bias)])
    assert affine_magnitude(None, None) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(bad):
    fine = torch.ones(3)
    wrong = torch.tensor([1.0, bad, 1.0])
    assert all_finite(Moments(2, fine, fine))
    assert not all_finite(Moments(2, wrong, fine))
    if not bad < 0:
        assert not all_finite(Moments(2, fine, wrong))


def test_batch_noise_is_that_of_an_analysis_of_variance():
    groups = [np.random.default_rng(seed).normal(seed % 3, 1.0, 20) for seed in range(6)]
    everything = np.concatenate(groups)
    between = sum(len(g) * (g.mean() - everything.mean()) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(everything) - len(groups))
    assert stats.f_oneway(*groups).statistic == pytest.approx(between / within)  # so "between" is its mean square
    pooled = Moments.pool([Moments.of(torch.from_numpy(g).view(-1, 1)) for g in groups])
    expected = math.sqrt(between / 20 / (everything.var() + EPS))
    assert batch_noise(pooled, EPS).item() == pytest.approx(expected, rel=1e-12)


def test_batch_noise_of_uncorrelated_values_is_one_over_the_root_of_their_number():
    pooled = Moments.pool([Moments.of(torch.randn(25, 1)) for _ in range(4000)])
    assert batch_noise(pooled).item() == pytest.approx(1 / 5, rel=0.05)
    assert normalization_batch_size(batch_noise(pooled), samples=25, level=0.1).item() == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("batches", [0, 1])
def test_batch_noise_of_fewer_than_two_batches_is_infinite(batches):
    pooled = Moments.pool([Moments.empty(2), *[Moments.of(torch.randn(9, 2)) for _ in range(batches)]])
    assert batch_noise(pooled).isposinf().all()
