"""The measures of every step are those of the shift module, and drift and noise are what they are by theory."""

import math

import pytest
import torch
from torch import nn

import bnkit
from bnkit import Moments
from bnkit.monitoring.step_measures import FAST, SLOW, LayerState, StepMeasures, StepRows
from bnkit.shift import shift


def _measure(layers, batches, capacity=64):
    """Run each batch through each layer; the rows and the state as float64, and references of every step."""
    measures = StepMeasures(layers, capacity)
    shifts = []
    for x in batches:
        measures.recorder.before()
        with torch.no_grad():
            row = []
            for layer in layers.values():
                unbiased = Moments(len(x), x.double().mean(0), x.double().var(0))
                row.append(shift(unbiased, Moments(1, layer.running_mean, layer.running_var), layer.eps))
                layer(x)
        if measures.recorder.after():
            measures.digest()
        shifts.append(row)
    measures.digest()
    rows, state = measures.result()
    return StepRows(*rows.double()), LayerState(*state.double()), shifts


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_every_steps_measures_are_those_of_the_shift_module(capacity):
    layers = {"a": nn.BatchNorm1d(5), "b": nn.BatchNorm1d(5, momentum=0.01, eps=1e-2)}
    batches = [torch.randn(16, 5) * 2 + 1 for _ in range(20)]
    rows, state, shifts = _measure(layers, batches, capacity)
    for k, row in enumerate(shifts):
        for i, expected in enumerate(row):
            torch.testing.assert_close(
                rows.mean_shift_squared[k, i], expected.mean.square().mean(), rtol=1e-3, atol=1e-7
            )
            torch.testing.assert_close(
                rows.log_variance_ratio[k, i], expected.log_variance_ratio.mean(), rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(rows.kl[k, i], expected.kl.mean(), rtol=1e-3, atol=1e-5)
    for i, expected in enumerate(shifts[-1]):
        torch.testing.assert_close(state.wasserstein2[i], expected.wasserstein2.mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.psi[i], expected.psi.mean(), rtol=1e-3, atol=1e-4)
    assert rows.calls.all()
    assert not rows.nonfinite.any()


def _settled(channels, **options):
    """A layer whose running statistics hardly move, so that the unit of the measures is 1."""
    return nn.BatchNorm1d(channels, momentum=1e-3, **options).double()


@pytest.mark.parametrize("n", [4, 64])
def test_noise_is_sigma_over_root_n(n):
    batches = [torch.randn(n, 64, dtype=torch.float64) for _ in range(300)]
    rows, _, _ = _measure({"bn": _settled(64)}, batches)
    assert rows.noise_squared.nanmean().sqrt().item() == pytest.approx(1 / math.sqrt(n), rel=0.03)


def test_noise_does_not_take_a_drift_for_scatter():
    batches = [torch.randn(64, 64, dtype=torch.float64) + 0.002 * k for k in range(300)]
    rows, _, _ = _measure({"bn": _settled(64)}, batches)
    assert rows.noise_squared.nanmean().sqrt().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("steps", [50, 60, 100, 400])
def test_drift_is_next_to_nothing_where_there_is_only_noise(steps):
    squares = []
    for _ in range(5):
        batches = [torch.randn(16, 256, dtype=torch.float64) for _ in range(steps)]
        squares.append(_measure({"bn": _settled(256)}, batches)[1].drift.item() ** 2)
    noise_squared = 1 / 16
    # Uncorrected, the squared difference of the two averages would be 0.03 to 0.05 of the noise's square.
    assert sum(squares) / len(squares) < 0.006 * noise_squared


def test_drift_of_a_linear_trend_is_the_lag_between_the_two_averages():
    slope, steps = 0.01, 600
    batches = [torch.randn(8, 32, dtype=torch.float64) + slope * k for k in range(steps)]
    _, state, _ = _measure({"bn": _settled(32)}, batches)
    # A settled exponential average of weight w lags a line by (1 - w) / w steps.
    lag = (1 - SLOW) / SLOW - (1 - FAST) / FAST
    # In standard deviations of the batches; eps and the short warm-up are small beside the tolerance.
    assert state.drift.item() == pytest.approx(slope * lag, rel=0.03)


def test_drift_is_unknown_before_fifty_steps():
    batches = [torch.randn(8, 4) for _ in range(50)]
    assert _measure({"bn": nn.BatchNorm1d(4)}, batches[:49])[1].drift.isnan()
    assert _measure({"bn": nn.BatchNorm1d(4)}, batches)[1].drift.isfinite()


def test_what_cannot_be_known_is_nan_and_never_zero():
    layers = {"in": nn.BatchNorm1d(3), "out": nn.BatchNorm1d(2)}
    measures = StepMeasures(layers, 8)
    for _ in range(4):
        measures.recorder.before()
        layers["in"](torch.randn(8, 3))
        measures.recorder.after()
    measures.digest()
    rows, state = measures.result()
    rows, state = StepRows(*rows), LayerState(*state)
    for field in ("mean_shift_squared", "log_variance_ratio", "kl", "noise_squared"):
        assert getattr(rows, field)[:, 1].isnan().all(), field
    for field in ("wasserstein2", "psi", "drift", "dead_fraction"):
        assert getattr(state, field)[1].isnan(), field
    assert rows.calls[:, 1].tolist() == [0] * 4
    assert rows.nonfinite[:, 1].tolist() == [0] * 4
    assert rows.noise_squared[0].isnan().all(), "one batch has no scatter"


def test_a_layer_that_skips_the_last_step_keeps_what_was_last_known_of_it():
    layers = {"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)}
    batches = [torch.randn(16, 3) + 1 for _ in range(6)]
    reference = _measure({"b": nn.BatchNorm1d(3)}, batches[:4])[1]
    measures = StepMeasures(layers, 64)
    for k, x in enumerate(batches):
        measures.recorder.before()
        layers["a"](x)
        if k < 4:
            layers["b"](x)
        measures.recorder.after()
        if k == 4:
            measures.digest()  # and once more, with a chunk that b has no part in
    measures.digest()
    state = LayerState(*measures.result()[1].double())
    for field in ("wasserstein2", "psi", "dead_fraction"):
        torch.testing.assert_close(getattr(state, field)[1], getattr(reference, field)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_is_marked_from_its_step_on(bad):
    batches = [torch.randn(8, 3) for _ in range(6)]
    batches[2][0, 1] = bad
    rows, _, _ = _measure({"bn": nn.BatchNorm1d(3)}, batches)
    assert rows.nonfinite.flatten().tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("weight", "bias", "scale", "dead"),
    [
        (1.0, 0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0, 1.0),
        (1.0, -9.0, 1.0, 1.0),
        (1.0, 9.0, 1.0, 0.0),
        (1.0, 0.0, 0.0, 1.0),
        (0.0, 5.0, 1.0, 1.0),
    ],
)
def test_dead_channels_are_those_of_the_shift_module(weight, bias, scale, dead):
    layer = nn.BatchNorm1d(4)
    nn.init.constant_(layer.weight, weight)
    nn.init.constant_(layer.bias, bias)
    x = torch.randn(64, 4) * scale
    _, state, _ = _measure({"bn": layer}, [x])
    assert state.dead_fraction.item() == dead
    assert bnkit.shift.dead_channels(Moments.of(x), layer.weight, layer.bias).double().mean() == dead
    assert state.weight.item() == pytest.approx(abs(weight))
    assert state.bias.item() == pytest.approx(abs(bias))


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e-6), (1e-3, 1e-4), (0.0, 1e6)])
def test_far_means_and_tiny_or_huge_variances_stay_finite(offset, scale):
    batches = [torch.randn(32, 3) * scale + offset for _ in range(60)]
    layer = nn.BatchNorm1d(3)
    rows, state, shifts = _measure({"bn": layer}, batches)
    assert rows.kl.isfinite().all()
    assert (rows.kl >= 0).all()
    assert all(value.isfinite().all() for value in state)
    # Once settled, the mean comes out to rounding: about 1e-6 of |mean| / std.
    expected = torch.stack([row[0].mean.square().mean() for row in shifts])[40:]
    unit = math.sqrt(scale**2 + layer.eps)
    assert (rows.mean_shift_squared[40:, 0].sqrt() - expected.sqrt()).abs().max() < 1e-3 + 1e-5 * offset / unit


def test_what_is_carried_on_gives_the_same_numbers_to_the_last_bit():
    batches = [torch.randn(8, 3) for _ in range(80)]
    results = []
    for interrupted in (False, True):
        layer = nn.BatchNorm1d(3)
        measures = StepMeasures({"bn": layer}, 64)
        for k, x in enumerate(batches):
            measures.recorder.before()
            layer(x)
            measures.recorder.after()
            if k in (20, 55):
                measures.digest()
                if interrupted:
                    carried, pending = measures.carried(), measures.pending()
                    measures = StepMeasures({"bn": layer}, 64)
                    measures.carry(carried, pending)
        measures.digest()
        results.append(measures.result())
    for plain, resumed in zip(*results, strict=True):
        assert torch.equal(plain.nan_to_num(), resumed.nan_to_num())
        assert torch.equal(plain.isnan(), resumed.isnan())


def test_a_layer_that_joins_later_is_unknown_before():
    carried = {"old": torch.zeros(9, 3)}
    pending = {"old": torch.ones(6, 5)}
    measures = StepMeasures({"old": nn.BatchNorm1d(3), "new": nn.BatchNorm1d(2)}, 8)
    measures.carry(carried, pending)
    rows = StepRows(*measures.result()[0])
    assert rows.kl[:, 0].tolist() == [1] * 5
    assert rows.kl[:, 1].isnan().all()
    assert rows.calls[:, 1].tolist() == [0] * 5
