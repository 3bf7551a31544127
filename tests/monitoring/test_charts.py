"""A layer is judged against its own past, and the stated rate of false alarms is kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bnkit.monitoring.charts import ShiftChart, staleness, student_t_quantile


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-9, 0.5), st.floats(1, 1000))
def test_the_quantile_is_that_of_students_t(tail, degrees):
    # 1 - tail has 1e-16 of rounding: as much of a tail of 1e-9 as 1e-7
    expected = stats.t.isf(tail, degrees)
    assert student_t_quantile(1 - tail, degrees) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def _slow_scores(values, layers, rate, window, q):
    """The definition, step by step and layer by layer."""
    scores = torch.full(values.shape, math.nan, dtype=torch.float64)
    for layer in range(values.shape[1]):
        logs, rows = [], []
        for k, value in enumerate(values[:, layer].tolist()):
            if math.isfinite(value) and math.isfinite(math.log(max(value, 1e-12))):
                logs.append(math.log(max(value, 1e-12)))
                rows.append(k)
        means = [None if i < q - 1 else sum(logs[i - q + 1 : i + 1]) / q for i in range(len(logs))]
        for i, k in enumerate(rows):
            past = [m for m in means[max(0, i - q - window + 1) : max(0, i - q + 1)] if m is not None]
            n = len(past)
            if means[i] is None or n < window / 2:
                continue
            mean, effective = sum(past) / n, n / q
            var = sum((m - mean) ** 2 for m in past) / n * effective / (effective - 1)
            t = (means[i] - mean) / math.sqrt(max(var, 1e-12) * (1 + 1 / effective))
            scores[k, layer] = t / stats.t.isf(rate / layers, effective - 1)
    return scores


def _values(steps, layers, missing=0.0):
    values = torch.randn(steps, layers, dtype=torch.float64).exp()
    values[torch.rand(steps, layers) < missing] = math.nan
    return values


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("subgroup", [1, 3])
def test_scores_are_students_t_over_its_limit(subgroup, missing):
    values = _values(200, 4, missing)
    values[150:153, 2] *= 1e5
    chart = ShiftChart(4, rate=1e-3, window=40, subgroup=subgroup)
    expected = _slow_scores(values, 4, 1e-3, 40, subgroup)
    torch.testing.assert_close(chart.update(values), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert expected.nan_to_num().max() > 1, "the planted jump is an alarm"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=8), st.sampled_from([0.0, 0.3]), st.integers(0, 9))
def test_the_chunks_in_which_values_come_make_no_difference(chunks, missing, seed):
    torch.manual_seed(seed)
    values = _values(sum(chunks), 3, missing)
    whole, parts = (ShiftChart(3, rate=0.01, window=30) for _ in range(2))
    pieces = []
    for chunk in torch.split(values, chunks):
        pieces.append(parts.update(chunk))
        resumed = ShiftChart(3, rate=0.01, window=30)
        resumed.restore(parts.state())
        parts = resumed
    torch.testing.assert_close(torch.cat(pieces), whole.update(values), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("degrees", [20, 100])
def test_the_stated_rate_of_false_alarms_is_kept_and_not_by_silence(degrees):
    steps, layers, rate = 40_000, 5, 0.05
    normal = torch.randn(steps, layers, degrees)
    scores = ShiftChart(layers, rate=rate).update(normal.square().mean(2))
    exceedances = int((scores > 1).sum())
    # Overlapping means exceed in runs of up to three, so that the count scatters by more than Poisson's.
    expected = rate * steps
    assert exceedances < expected + 3 * math.sqrt(3 * expected)
    assert exceedances > expected / 10


def test_nothing_is_said_before_half_the_window_is_known():
    scores = ShiftChart(1, rate=0.01, window=40, subgroup=2).update(_values(60, 1))
    # Of n values n - 1 are means of two; those before the judged one and free of its values must be 20.
    assert scores[:22].isnan().all()
    assert scores[22:].isfinite().all()


def test_a_jump_is_seen_at_once_and_only_in_its_layer():
    values = _values(120, 3)
    values[100:, 1] *= 1e4
    scores = ShiftChart(3, rate=1e-5).update(values)
    beyond = (scores > 1).nonzero().tolist()
    assert {layer for _, layer in beyond} == {1}
    assert 100 <= beyond[0][0] <= 102


def test_a_level_that_lasts_becomes_the_usual():
    values = _values(600, 1)
    values[300:] *= 1e4
    scores = ShiftChart(1, rate=1e-5).update(values)
    assert (scores[300:310] > 1).any()
    assert not (scores[420:] > 1).any()


def test_constant_and_vanishing_values_are_no_alarm():
    for value in (0.0, 1e-30, 3.0):
        scores = ShiftChart(2, rate=0.1).update(torch.full((200, 2), value))
        assert not (scores > 1).any()


def test_a_state_of_other_layers_is_not_used():
    chart = ShiftChart(2, rate=0.1)
    before = chart.state()
    chart.restore(ShiftChart(3, rate=0.1).state())
    assert chart.state().shape == before.shape


@pytest.mark.parametrize(
    "arguments",
    [{"rate": 0}, {"rate": 1}, {"rate": math.nan}, {"rate": 0.1, "window": 29}, {"rate": 0.1, "subgroup": 0}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"rate|window"):
        ShiftChart(2, **arguments)


def test_fixed_statistics_are_stale_where_the_bias_exceeds_a_batchs_noise():
    noise = torch.randn(30, 16, dtype=torch.float64) * 0.1
    within = torch.full_like(noise, 0.1**2)
    for bias, stale in ((0.0, False), (0.05, False), (0.5, True)):
        score, found, scatter = staleness(noise + bias, within, 1e-4)
        assert (score > 1) is stale
        assert found == pytest.approx((noise + bias).mean(0).square().mean().sqrt().item())
        assert scatter == pytest.approx(0.1)


def test_a_trend_does_not_hide_what_is_stale():
    trend = torch.linspace(0.3, 2.0, 24, dtype=torch.float64).unsqueeze(1).expand(24, 16)  # a layer left behind
    assert staleness(trend, torch.full_like(trend, 0.05**2), 1e-5)[0] > 1


def test_of_few_batches_staleness_says_nothing():
    assert all(math.isnan(value) for value in staleness(torch.ones(5, 3), torch.ones(5, 3), 0.01))


def test_staleness_is_silent_on_noise_at_the_stated_rate():
    torch.manual_seed(1)
    found = [staleness(torch.randn(8, 1, dtype=torch.float64), torch.ones(8, 1), 0.05)[0] > 1 for _ in range(1000)]
    assert sum(found) < 1000 * 0.05 * 2 + 20  # two-sided: t of either sign
