"""Recorder: a run of any length in bounded memory, at one resolution from begin to end."""

import itertools

import torch

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.recorder import Recorder


def _recorded(steps, keys=("a", "b"), **options):
    recorder = Recorder(RunHistory(), **options)
    for step in steps:
        recorder.log(dict.fromkeys(keys, float(step)), step)
    return recorder


def test_a_short_run_is_kept_whole():
    recorder = _recorded(range(0, 1000, 10))
    assert recorder.history.metrics["a"] == [(step, float(step)) for step in range(0, 1000, 10)]


def test_of_one_step_the_later_value_stands_and_what_is_not_finite_is_left_out():
    recorder = Recorder(RunHistory())
    for value in (1.0, 2.0, float("nan"), float("inf")):
        recorder.log({"a": value}, 3)
    recorder.log({"b": float("nan")}, 3)
    assert recorder.history.metrics == {"a": [(3, 2.0)]}


def test_a_long_run_is_thinned_out_evenly_and_ends_with_its_last_value():
    recorder = _recorded(range(100_000), points=400, whole=10)
    for series in recorder.history.metrics.values():
        steps = [step for step, _ in series]
        gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
        assert gaps == {recorder.bucket}
        assert 90 < len(series) <= 200
        assert series[-1] == (99_999, 99_999.0)


def test_a_short_series_beside_long_ones_is_not_thinned():
    recorder = Recorder(RunHistory(), points=100, whole=20)
    for step in range(10_000):
        recorder.log({"often": 1.0} | ({"seldom": 2.0} if step % 500 == 499 else {}), step)
    assert [step for step, _ in recorder.history.metrics["seldom"]] == list(range(499, 10_000, 500))


def test_more_series_than_points_end_in_a_bound_for_each():
    recorder = _recorded(range(500), keys=[str(i) for i in range(50)], points=100, whole=10)
    assert all(len(series) <= 10 for series in recorder.history.metrics.values())


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped():
    whole = _recorded(range(5_000), points=100, whole=10)
    half = _recorded(range(2_500), points=100, whole=10)
    resumed = Recorder(RunHistory(), points=100, whole=10)
    resumed.load_state_dict(half.state_dict())
    for step in range(2_500, 5_000):
        resumed.log(dict.fromkeys("ab", float(step)), step)
    assert resumed.history.metrics == whole.history.metrics
    assert all(isinstance(value, int | list | torch.Tensor) for value in half.state_dict().values())
