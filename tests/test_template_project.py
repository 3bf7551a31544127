"""In a project that is laid out as lightning-hydra-template lays one out: ``tests/template_project``."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import conv2d

PROJECT = Path(__file__).parent / "template_project"


def train(tmp_path, *overrides):
    """Run the project as its owner would, from its own directory; what it writes stays in a copy."""
    project = tmp_path / "project"
    if not project.exists():
        shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PYTHONPATH"))}
    result = subprocess.run(
        [sys.executable, "src/train.py", *overrides, "data.train_size=320"],
        cwd=project,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in project.iterdir()} == {"configs", "src", "logs"}, "something was written elsewhere"
    return project / "logs" / "train"


def columns(run):
    with (run / "csv" / "version_0" / "metrics.csv").open(newline="") as table:
        return set(next(csv.reader(table)))


def first_layer_statistics(state, size):
    """Mean and unbiased variance of what the first BatchNorm layer normalises, over all training images in float64."""
    images = torch.tensor(load_digits().images[:size], dtype=torch.float64)[:, None] / 16
    x = conv2d(images, state["net.conv1.weight"].double(), padding=1)
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


@pytest.mark.slow
def test_a_run_saves_recalibrated_statistics_and_leaves_its_page_where_the_project_writes(tmp_path):
    [run] = (train(tmp_path) / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {
        ".hydra", "bn_history.json", "checkpoints", "csv", "report.html", "train.log"
    }  # fmt: skip
    assert {"val/acc", "bn/recalibration_shift_worst", "bn/shift_median", "bn_shift/net_bn1"} <= columns(run)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    mean, variance = first_layer_statistics(state, 320)
    torch.testing.assert_close(state["net.bn1.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["net.bn1.running_var"].double(), variance, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_each_job_of_a_sweep_has_a_page_of_its_own_and_swaps_by_its_experiment(tmp_path):
    overrides = ("experiment=ghost", "callbacks.swap.rules.size=8", "test=false", "trainer.max_epochs=1")
    logs = train(tmp_path, "-m", *overrides, "model.optimizer.lr=0.1,0.01")
    [sweep] = (logs / "multiruns").iterdir()
    saved = {}
    for job in ("0", "1"):
        assert (sweep / job / "report.html").is_file()
        assert "bn/shift_median" in columns(sweep / job)
        saved[job] = torch.load(sweep / job / "checkpoints" / "last.ckpt", weights_only=True)
        [state] = [state for key, state in saved[job]["callbacks"].items() if key.startswith("BatchNormSwap")]
        assert set(state["plan"].values()) == {"Ghost(size=8, grouping='strided')"}
    assert not torch.equal(*(saved[job]["state_dict"]["net.bn1.running_mean"] for job in ("0", "1")))


@pytest.mark.slow
@pytest.mark.parametrize("without", ["callbacks=none", "~callbacks"])
def test_the_project_still_runs_without_its_callbacks(tmp_path, without):
    [run] = (train(tmp_path, without, "~logger", "trainer.max_epochs=1") / "runs").iterdir()
    assert not (run / "report.html").exists()
