"""Every benchmark at its smallest size: what it measures is there; how fast it was is not asked."""

import inspect
import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

from bnkit.benchmarks import BENCHES, _module, arguments_of, peers, run
from bnkit.benchmarks.ghost import _wrong, expected
from bnkit.benchmarks.models import chain, networks_of
from bnkit.benchmarks.recalibration import _off, population
from bnkit.benchmarks.result import Result
from bnkit.benchmarks.scaling import exponents
from bnkit.layers import batch_norm_layers

CONF = Path(str(files("bnkit.conf"))) / "bench"
SHARED = {"device", "seed"}


def config(tmp_path, *overrides):
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        return compose("benchmark", overrides=[f"output={tmp_path / 'benchmark.json'}", "quick=true", *overrides])


def measured(tmp_path, *overrides):
    """The one result of a run, after a look at all that holds for each."""
    ran = run(config(tmp_path, *overrides))
    assert json.loads((tmp_path / "benchmark.json").read_text()) == ran
    assert set(ran["machine"]) >= {"processor", "cores", "threads", "python", "versions", "date"}
    assert str(tmp_path) not in json.dumps(ran)
    [stored] = ran["results"]
    result = Result.from_dict(stored)
    for row in result.rows:
        for ratio in row.found.values():
            assert ratio.low <= ratio.median <= ratio.high
            assert math.isfinite(ratio.high)
        assert (row.goal is None) == (row.verdict == "")
    assert all(result.not_compared.values()), "with a reason"
    return result


def candidates(result):
    return {row.candidate for row in result.rows}


def test_every_benchmark_has_its_config_with_every_knob_and_a_smallest_size():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*BENCHES, "all"}
    for name in BENCHES:
        values = OmegaConf.load(CONF / f"{name}.yaml")
        parameters = set(inspect.signature(_module(name).measure).parameters)
        assert set(values) - {"bench", "smallest"} == parameters - SHARED, name
        assert set(values.smallest) <= parameters, name


def test_all_runs_each_of_them_with_what_they_share(tmp_path):
    ran = run(config(tmp_path, "bench=all", "benches=[import,swap]", "seed=5", f"output_markdown={tmp_path / 'p.md'}"))
    assert [result["bench"] for result in ran["results"]] == ["import", "swap"]
    assert ran["results"][1]["settings"]["seed"] == 5
    page = (tmp_path / "p.md").read_text()
    assert "### Import" in page
    assert "### Swap" in page
    assert "From a small run" in page


def test_one_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    def fails(*, rounds):
        raise OSError("no")

    monkeypatch.setattr(_module("import"), "measure", fails)
    cfg = config(tmp_path, "bench=all", "benches=[import,swap]")
    with pytest.raises(RuntimeError, match=r"these benchmarks failed: \{'import': 'OSError: no'\}"):
        run(cfg)
    [result] = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert result["bench"] == "swap"


def test_a_page_is_written_of_earlier_results(tmp_path):
    measured(tmp_path, "bench=import")
    page = tmp_path / "page.md"
    with pytest.raises(ValueError, match="output_markdown="):
        run(config(tmp_path, f"results=[{tmp_path / 'benchmark.json'}]"))
    run(config(tmp_path, f"results=[{tmp_path / 'benchmark.json'}]", f"output_markdown={page}"))
    assert "### Import" in page.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device"):
        run(config(tmp_path, "device=cuda"))


def test_imports_are_timed_in_fresh_interpreters(tmp_path):
    [row] = measured(tmp_path, "bench=import").rows
    assert (row.candidate, row.over) == ("import json", "pass")
    assert row.found["memory"].median >= 0.9, "it loads more, not less"


def test_an_import_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="'import nothing_of_this_name' failed"):
        run(config(tmp_path, "bench=import", "smallest.statements=[import nothing_of_this_name]"))


def test_swapping_is_timed_over_a_forward_and_its_growth_fitted(tmp_path):
    result = measured(tmp_path, "bench=swap")
    assert candidates(result) >= {"bnkit.swap", "bnkit.revert", "bnkit.swap: exponent of its time"}
    assert {curve.axis for curve in result.curves} == {"layers"}


def test_recalibration_is_timed_beside_the_peers_and_each_is_checked(tmp_path):
    result = measured(tmp_path, "bench=recalibration", "smallest.samples=null")
    assert candidates(result) | set(result.not_compared) >= {"bnkit", "torch update_bn", "fvcore update_bn_stats"}
    assert {row.over for row in result.rows} == {"bare no-grad forward"}
    notes = {row.candidate: row.note for row in result.rows}
    assert float(notes["bnkit"].split()[3]) < 1e-5 < float(notes["torch update_bn"].split()[3])


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find", lambda module, name: None)
    result = measured(tmp_path, "bench=recalibration", "smallest.samples=null")
    assert result.not_compared["fvcore update_bn_stats"] == 'not installed (pip install "bnkit[bench]")'
    result = measured(tmp_path, "bench=ghost", "smallest.compiler=null")
    assert result.not_compared["pytorch-tabnet GBN"] == 'not installed (pip install "bnkit[bench]")'
    assert "pytorch-tabnet GBN" not in candidates(result)


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    result = measured(tmp_path, "bench=recalibration", "smallest.samples.directory=nowhere")
    assert "Fashion-MNIST is not in nowhere" in result.not_compared["samples to a standard error on Fashion-MNIST"]


def test_the_samples_to_a_standard_error_are_measured_and_what_they_are_worth(tmp_path):
    result = measured(tmp_path, "bench=recalibration")
    if result.not_compared.keys() >= {"samples to a standard error on Fashion-MNIST"}:
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    rows = {row.candidate: row for row in result.rows}
    assert 0 < rows["samples needed"].found["value"].median <= 1
    worst, usual = (rows[f"mean off, in std: {which}"] for which in ("worst channel", "root mean square"))
    assert worst.found["value"].median >= usual.found["value"].median > 0


def test_the_reference_variance_is_that_of_all_values():
    model = chain(1, 3)
    data = [torch.randn(4, 3, 5, 5) + shift for shift in range(3)]
    [exact] = population(model, data).values()
    values = model[0](torch.cat(data)).detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(exact, values.var(1, correction=0))
    [layer] = batch_norm_layers(model).values()
    layer.running_var.copy_(exact * torch.tensor([1.0, 1.1, 0.5]))
    assert _off(model, population(model, data)) == pytest.approx(0.5, rel=1e-5)


def test_the_monitor_is_timed_beside_wandb_and_stand_ins_that_are_called_so(tmp_path):
    result = measured(tmp_path, "bench=monitor")
    names = candidates(result)
    assert "bnkit" in names
    assert sum(name.startswith("stand-in: ") for name in names) == 2
    assert "wandb.watch(log='gradients', log_freq=1)" in names | set(result.not_compared)
    assert "fastai ActivationStats" in result.not_compared
    assert {row.note for row in result.rows if "cpu" in row.found} == {"weights bit-identical"}


def test_ghosts_are_timed_in_both_groupings_and_layouts(tmp_path):
    result = measured(tmp_path, "bench=ghost", "smallest.compiler=null")
    assert candidates(result) >= {"bnkit strided", "bnkit contiguous"}
    assert {row.what.split()[0] for row in result.rows} == {"NCHW", "NC", "channels_last"}
    goals = {row.what.split()[0]: row.goal.at_most for row in result.rows if row.goal}
    assert goals == {"NCHW": 1.05, "channels_last": 1.25, "NC": 2.0}
    assert all(row.note == "" for row in result.rows if row.candidate.startswith("bnkit"))


@pytest.mark.slow
def test_compiled_ghosts_are_compared_with_compiled_batch_norm(tmp_path):
    result = measured(tmp_path, "bench=ghost", "smallest.shapes={NC: [32, 4]}")
    compiled = [row for row in result.rows if row.what.endswith(", compiled")]
    assert {row.candidate for row in compiled} == {"bnkit strided", "bnkit contiguous"}
    assert {row.goal.at_most for row in compiled} == {1.3}


@pytest.mark.parametrize("grouping", ["strided", "contiguous"])
@pytest.mark.parametrize("samples", [6, 7])
def test_the_reference_normalises_each_ghost_by_itself(grouping, samples):
    x = torch.randn(samples, 2, 50)
    output = expected(x, 3, grouping)
    ghosts = [output[i::2] for i in range(2)] if grouping == "strided" else torch.tensor_split(output, 2)
    for ghost in ghosts:
        torch.testing.assert_close(ghost.mean((0, 2)), torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(
            ghost.var((0, 2), correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0
        )


def test_a_peer_that_computes_something_else_is_told():
    x = torch.randn(8, 3, 4, 4) + 1
    assert "computes something else" in _wrong(nn.BatchNorm2d(3), x, 4)


def test_sync_is_timed_in_real_processes(tmp_path):
    result = measured(tmp_path, "bench=sync")
    assert candidates(result) == {"bnkit Sync"}
    assert result.not_compared == {"torch SyncBatchNorm": "it runs on GPUs only"}
    assert result.rows[0].found["memory"].median > 0


def test_cost_is_measured_against_size_and_growth_fitted(tmp_path):
    result = measured(tmp_path, "bench=scaling")
    assert {(curve.name, curve.axis) for curve in result.curves} == {
        (name, axis) for name in ("recalibration", "monitor", "ghost") for axis in ("layers", "samples")
    }
    assert "samples 8 to 32" in {row.what for row in result.rows}, "the three largest"


@pytest.mark.parametrize(("power", "flagged"), [(0.5, True), (0.0, False), (-0.5, False)])
def test_what_grows_faster_than_the_work_is_flagged(power, flagged):
    sizes = [1, 10, 100, 1000]
    for row in exponents("own", "layers", sizes, [[size**power * factor for factor in (1, 2, 3)] for size in sizes]):
        assert row.verdict == ("missed" if flagged else "met")
        assert ("grows faster than the work" in row.note) is flagged


def test_growth_at_the_large_end_is_not_hidden_by_a_fall_at_the_small_one():
    ratios = [[16.0], [4.0], [1.0], [1.5], [2.0]]
    everywhere, largest = exponents("own", "layers", [1, 10, 100, 1000, 10_000], ratios)
    assert (everywhere.verdict, largest.verdict) == ("met", "missed")


def test_an_unknown_subject_is_refused(tmp_path):
    with pytest.raises(ValueError, match="subjects=\\['nothing'\\] is unknown"):
        run(config(tmp_path, "bench=scaling", "subjects=[nothing]"))


@pytest.mark.parametrize(
    ("depths", "pixels", "expected_networks"),
    [
        ([2, 2], 8, [((2, 2), 8)]),
        ([2, 2], [16, 8], [((2, 2), 16)]),
        ([[2], [3]], [16, 8], [((2,), 16), ((3,), 8)]),
        ([[2], [3]], 8, [((2,), 8), ((3,), 8)]),
    ],
)
def test_one_network_or_several_are_given(depths, pixels, expected_networks):
    assert networks_of(depths, pixels) == expected_networks


def test_too_few_pixels_are_refused():
    with pytest.raises(ValueError, match="pixels has 1 numbers, but depths 2 networks"):
        networks_of([[1], [2]], [8])


def test_the_smallest_sizes_are_taken_only_when_asked_for(tmp_path):
    cfg = config(tmp_path, "bench=swap", "quick=false", "rounds=7")
    assert arguments_of(cfg)["rounds"] == 7
    assert arguments_of(config(tmp_path, "bench=swap"))["rounds"] == 2
