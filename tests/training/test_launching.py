"""Each way to start a job's processes works, or is refused with the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnkit.dashboard import sources
from bnkit.resolvers import started

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = (
    "swap=sync",
    "data.train_size=128",
    "data.validation_size=64",
    "trainer.max_epochs=1",
    "test=false",
    "threads=1",
    "callbacks.shift_monitor.every_n_steps=2",
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launched(command, tmp_path, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [*map(str, command)],
        cwd=tmp_path,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def weights(folder):
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.ddp
@pytest.mark.slow
def test_every_launch_mode_trains_the_same_model_in_one_directory(tmp_path):
    commands = {
        "ddp": [sys.executable, SCRIPT, "trainer=ddp"],
        "ddp_spawn": [sys.executable, SCRIPT, "trainer=ddp_spawn"],
        "ddp_fork": [sys.executable, SCRIPT, "trainer=ddp_fork"],
        "torchrun": [*TORCHRUN, SCRIPT, "trainer=ddp"],
    }
    found = {}
    for name, command in commands.items():
        folder = tmp_path / name
        folder.mkdir()
        result = launched([*command, *SHORT], folder)
        assert result.returncode == 0, result.stderr
        assert [path.name for path in folder.iterdir()] == ["outputs"], "something was written elsewhere"
        [run_dir] = (folder / "outputs" / "train").iterdir()
        assert {"report.html", "checkpoints", "csv", "wandb", "result.json"} <= {
            path.name for path in run_dir.iterdir()
        }
        [run] = (run_dir / "wandb").glob("offline-run-*")
        history = sources.read(run)
        assert "bn/shift_median" in history.metrics
        assert "bn/recalibration_shift_worst" in history.metrics
        found[name] = weights(run_dir)
    for name, state in found.items():
        for key, value in state.items():
            assert torch.equal(value, found["ddp"][key]), (name, key)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp_spawn", "torchrun"])
def test_a_sweep_of_two_processes_each_trains_each_job_on_all_its_data(tmp_path, mode):
    command = [*TORCHRUN, SCRIPT] if mode == "torchrun" else [sys.executable, SCRIPT]
    trainer = "trainer=ddp" if mode == "torchrun" else "trainer=ddp_spawn"
    result = launched([*command, "--multirun", trainer, *SHORT, "seed=0,1"], tmp_path)
    assert result.returncode == 0, result.stderr
    [sweep] = (tmp_path / "outputs" / "train").iterdir()
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1"]
    ids, groups = [], []
    for job in ("0", "1"):
        checkpoint = torch.load(sweep / job / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 128 // 16 // 2, "a process had more or less than its share"
        [run] = (sweep / job / "wandb").glob("offline-run-*")
        ids.append(run.name.rsplit("-", 1)[1])
        [log] = run.glob("*.wandb")
        shown = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log],
            capture_output=True,
            text=True,
            check=True,
        )
        groups.append(f'"run_group":"{sweep.name}"' in shown.stdout)
    assert len(set(ids)) == 2
    assert groups == [True, True], "the jobs of a sweep are one group"


@pytest.mark.slow
def test_processes_that_would_repeat_the_sweep_are_refused_before_training(tmp_path):
    result = launched([sys.executable, SCRIPT, "--multirun", "trainer=ddp", *SHORT, "seed=0,1"], tmp_path)
    assert result.returncode == 1
    assert "use trainer=ddp_spawn, or start every process yourself with torchrun" in result.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_slurm_job_has_one_directory_for_all_its_tasks(monkeypatch):
    started.cache_clear()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert started() == "slurm_17"
    started.cache_clear()
