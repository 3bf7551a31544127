import json

import pytest
from hydra import compose, initialize_config_module

from bnkit.benchmarks import run


def config(tmp_path, *overrides):
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        return compose("benchmark", overrides=[f"output={tmp_path / 'benchmark.json'}", *overrides])


def test_the_monitor_is_timed_beside_hooks_on_the_same_network(tmp_path):
    small = ["width=4", "depths=[1,1]", "batch_size=4", "pixels=8", "steps=4", "rounds=2"]
    result = run(config(tmp_path, *small))
    assert result["layers"] == 6
    assert result["own share"] > 0
    assert set(result["ratios"]) == {"bnkit", "hooks: mean and std", "hooks: mean, std and histogram"}
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bench=nothing is unknown"):
        run(config(tmp_path, "bench=nothing"))
