import time

import pytest

from bnkit.benchmarks.timing import Candidate, Ratio, Timings, interleave, slope


def test_every_candidate_runs_once_a_round_in_changing_order():
    ran = []
    candidates = {name: lambda name=name: ran.append(name) for name in "abc"}
    timings = interleave(candidates, baseline="a", rounds=20, warmup=2)
    rounds = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) == 22
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert all(len(seconds) == 20 for seconds in (*timings.cpu.values(), *timings.wall.values()))


def test_what_is_prepared_is_prepared_each_time_and_not_timed():
    ran = []
    own = Candidate(lambda: ran.append("run"), lambda: (ran.append("prepare"), time.sleep(0.05)))
    idle = Candidate(lambda: time.sleep(0.05))
    timings = interleave({"own": own, "idle": idle}, baseline="idle", rounds=3, warmup=0)
    assert ran == ["prepare", "run"] * 3
    assert timings.ratio("own", "wall").high < 1


def test_ratios_are_taken_within_a_round():
    # The machine was ten times slower in the second round, for both.
    timings = Timings(
        "base", {"base": [1.0, 10.0, 1.0], "own": [2.0, 20.0, 2.0]}, {"base": [1.0] * 3, "own": [3.0] * 3}
    )
    ratio = timings.ratio("own")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert timings.ratio("own", "wall").median == 3.0
    assert timings.ratio("base", "cpu", over="own").median == 0.5


def test_the_spread_is_from_the_5th_to_the_95th_percentile():
    own = [float(i) for i in range(101)]
    ratio = Timings("base", {"base": [1.0] * 101, "own": own}, {}).ratio("own")
    assert (ratio.median, ratio.low, ratio.high) == (50.0, pytest.approx(5.0), pytest.approx(95.0))


def test_waiting_takes_wall_time_and_no_cpu_time():
    timings = interleave(
        {"busy": lambda: sum(range(200_000)), "idle": lambda: time.sleep(0.05)}, baseline="busy", rounds=3
    )
    assert min(timings.wall["idle"]) >= 0.05 > max(timings.cpu["idle"])


def test_the_result_has_ratios_and_no_seconds():
    timings = Timings("base", {"base": [1.0], "own": [2.0]}, {"base": [1.0], "own": [4.0]})
    assert timings.to_dict() == {
        "baseline": "base",
        "rounds": 1,
        "ratios": {
            "own": {
                "cpu": {"median": 2.0, "low": 2.0, "high": 2.0},
                "wall": {"median": 4.0, "low": 4.0, "high": 4.0},
            }
        },
    }


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found_whatever_its_factor(exponent):
    sizes = [10, 30, 100, 1000]
    rounds = [[3 * size**exponent, 7 * size**exponent] for size in sizes]
    assert slope(sizes, rounds) == Ratio(*[pytest.approx(exponent, abs=1e-12)] * 3)


def test_the_spread_of_an_exponent_is_that_of_the_rounds():
    fitted = slope([1, 10], [[1.0, 1.0, 1.0], [1.0, 10.0, 100.0]])
    assert (fitted.median, fitted.low, fitted.high) == (
        pytest.approx(1.0),
        pytest.approx(0.1),
        pytest.approx(1.9),
    )


@pytest.mark.parametrize(("baseline", "rounds"), [("other", 1), ("own", 0)])
def test_what_cannot_be_timed_is_refused(baseline, rounds):
    with pytest.raises(ValueError, match=r"baseline|rounds"):
        interleave({"own": lambda: None}, baseline=baseline, rounds=rounds)
