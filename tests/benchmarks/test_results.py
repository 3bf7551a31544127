import json

import pytest

from bnkit.benchmarks.page import write_page
from bnkit.benchmarks.result import Curve, Goal, Result, Row, clock_of, rows
from bnkit.benchmarks.timing import Ratio, Timings

MACHINE = {
    "processor": "Abacus 7",
    "cores": 2,
    "threads": 1,
    "python": "3.11",
    "versions": {"torch": "2.13"},
    "date": "2026-01-01",
}


def result(bench="monitor", device="cpu", median=1.005, rounds=20, **other):
    ratio = Ratio(median, median - 0.1, median + 0.1)
    row = Row("20 layers", "bnkit", "no monitor", {"cpu": ratio, "wall": ratio}, Goal("cpu", 1.01))
    return Result(bench, device, "What is asked.", rounds, [row], ["A note."], {"a peer": "not installed"}, **other)


def stored(*results, device="cpu", quick=False):
    return {
        "command": "bnkit-benchmark bench=monitor",
        "device": device,
        "seed": 0,
        "quick": quick,
        "machine": MACHINE | ({} if device == "cpu" else {"accelerator": "Big GPU", "cuda": "13"}),
        "results": [one.to_dict() for one in results],
    }


@pytest.mark.parametrize(
    ("median", "at_most", "verdict"), [(1.0, 1.01, "met"), (1.01, 1.01, "met"), (1.011, 1.01, "missed")]
)
def test_the_median_decides_whether_a_goal_is_met(median, at_most, verdict):
    ratio = Ratio(median, median - 0.5, median + 0.5)
    row = Row("", "own", "base", {"cpu": ratio, "wall": Ratio(9, 9, 9)}, Goal("cpu", at_most))
    assert row.verdict == verdict


def test_a_row_without_a_goal_has_no_verdict():
    assert Row("", "peer", "base", {"cpu": Ratio(9, 9, 9)}).verdict == ""


def test_goals_are_judged_by_cpu_time_on_the_cpu_and_by_the_wall_elsewhere():
    assert [clock_of(device) for device in ("cpu", "cuda", "cuda:1")] == ["cpu", "wall", "wall"]


def test_a_row_for_each_candidate_has_times_and_memory_over_the_baseline():
    timings = Timings("base", {"base": [1.0], "own": [2.0]}, {"base": [1.0], "own": [3.0]})
    [row] = rows("here", timings, {"base": 10, "own": 15}, goals={"own": Goal("memory", 2)}, notes={"own": "so"})
    assert (row.what, row.candidate, row.over, row.note, row.verdict) == ("here", "own", "base", "so", "met")
    assert {name: ratio.median for name, ratio in row.found.items()} == {"cpu": 2.0, "wall": 3.0, "memory": 1.5}


def test_memory_over_none_is_left_out():
    timings = Timings("base", {"base": [1.0], "own": [2.0]}, {"base": [1.0], "own": [3.0]})
    assert "memory" not in rows("here", timings, {"base": 0, "own": 15})[0].found


def test_a_result_comes_back_from_json_as_it_was():
    one = result(curves=[Curve("monitor", "layers", [1, 10], [Ratio(1, 1, 1), Ratio(2, 1, 3)])], settings={"width": 4})
    text = json.dumps(one.to_dict())
    assert Result.from_dict(json.loads(text)) == one
    assert '"verdict": "met"' in text
    assert "second" not in text


def test_the_text_has_ratio_spread_goal_and_verdict_and_what_was_not_compared():
    text = result(median=1.2).text()
    assert "1.200 (1.100 to 1.300)" in text
    assert "CPU time ≤ 1.01" in text
    assert "missed" in text
    assert "A note." in text
    assert "not compared: a peer: not installed" in text


def test_the_page_states_command_machine_versions_and_spread(tmp_path):
    write_page([stored(result())], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for told in (
        "| 20 layers | bnkit | no monitor | 1.005 (0.905 to 1.105) |",
        "CPU time ≤ 1.01 | met |",
        "`bnkit-benchmark bench=monitor`, 20 rounds, seed 0, 2026-01-01. Abacus 7, 2 cores, 1 threads",
        "Python 3.11, torch 2.13",
        "Not compared: a peer: not installed.",
    ):
        assert told in page
    assert "small run" not in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize(("rounds", "quick"), [(20, True), (2, False)])
def test_a_small_run_is_marked_at_the_top(rounds, quick, tmp_path):
    write_page([stored(result(rounds=rounds), quick=quick)], tmp_path / "page.md")
    top, _ = (tmp_path / "page.md").read_text().split("## On a CPU")
    assert "From a small run" in top


def test_devices_are_kept_apart_and_a_later_run_replaces_an_earlier_one(tmp_path):
    runs = [
        stored(result(median=1.111)),
        stored(result(device="cuda", median=1.333), device="cuda"),
        stored(result(median=1.222), result("swap", median=1.444)),
    ]
    write_page(runs, tmp_path / "page.md")
    cpu, gpu = (tmp_path / "page.md").read_text().split("## On a GPU")
    assert "1.111" not in cpu
    assert "1.222" in cpu
    assert "1.444" in cpu
    assert "1.333" not in cpu
    assert "1.333" in gpu
    assert "Big GPU (CUDA 13)" in gpu


def test_the_pictures_show_every_row_and_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in bnkit[bench]")
    curve = Curve("monitor", "layers", [1, 10], [Ratio(1.1, 1, 1.2), Ratio(2, 1, 3)])
    write_page([stored(result(), result("scaling", curves=[curve]))], tmp_path / "page.md")
    assert "page-monitor-cpu.svg" in (tmp_path / "page.md").read_text()
    assert "20 layers: bnkit" in (tmp_path / "page-monitor-cpu.svg").read_text()
    scaling = (tmp_path / "page-scaling-cpu.svg").read_text()
    assert "layers" in scaling
    assert "monitor" in scaling


def test_the_same_numbers_make_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in bnkit[bench]")
    for folder in ("a", "b"):
        write_page([stored(result())], tmp_path / folder / "page.md")
    first, second = ((tmp_path / folder / "page-monitor-cpu.svg").read_bytes() for folder in ("a", "b"))
    assert first == second
