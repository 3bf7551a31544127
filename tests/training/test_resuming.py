from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from bnkit.training import run
from bnkit.training.resuming import AtomicCheckpointIO, RandomStates
from bnkit.training.run_directory import RESULT_NAME

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = ("data.train_size=160", "data.validation_size=64", "trainer.max_epochs=3", "test=false", "threads=1")


def config(job_config, name, *overrides):
    return job_config("logger=none", *SHORT, *overrides, run=name, short=False)


def last(folder):
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def assert_ended_alike(one, other):
    """The same weights, statistics, optimizer and random states, bit for bit, and the same monitor and table."""
    one, other = last(one), last(other)
    assert one["epoch"] == other["epoch"]
    for part in ("state_dict", "optimizer_states", "random_states"):
        assert_identical(one[part], other[part], part)
    for name, state in one["callbacks"].items():
        if name.startswith(("ActivationShiftMonitor", "StatisticsComparison", "BatchNormSwap")):
            assert_identical(without_times(state), without_times(other["callbacks"][name]), name)


def without_times(state):
    """What was measured of the machine is not the same twice."""
    if isinstance(state, dict) and "lengths" in state:  # packed series
        rows = zip(*(torch.split(state[part], state["lengths"].tolist()) for part in ("steps", "values")), strict=True)
        return without_times(dict(zip(state["keys"], map(list, rows), strict=True)))
    if isinstance(state, dict):
        return {
            key: without_times(value) for key, value in state.items() if "seconds" not in key and "overhead" not in key
        }
    return state


def assert_identical(one, other, where):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert one == other or one != one, where


SWAPS = {
    "plain": [],
    "ghost": ["swap=ghost"],
    "renorm": ["swap=renorm", "callbacks.recalibration=null"],
    "frozen by a schedule": [
        "swap=none",
        "callbacks.swap.schedule={2: {_target_: bnkit.norms.Frozen}}",
        "model.optimizer.lr=0.01",
    ],
    "two processes": ["swap=sync", "trainer=ddp_fork"],
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_a_job_in_two_parts_ends_as_one_in_a_piece(job_config, tmp_path, swap):
    dropout = ("model.network.dropout=0.2", *swap, "callbacks.shift_monitor.every_n_steps=4")
    whole = run(config(job_config, "whole", *dropout))
    run(config(job_config, "parts", *dropout, "trainer.max_epochs=1"))
    parts = run(config(job_config, "parts", *dropout))
    assert_ended_alike(tmp_path / "whole", tmp_path / "parts")
    shared = {name for name in whole if "seconds" not in name}
    assert "val/accuracy" in shared
    assert {name: parts[name] for name in shared} == {name: whole[name] for name in shared}


def _wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "after"),
    [
        (signal.SIGTERM, "checkpoints/last.ckpt"),
        (signal.SIGKILL, "checkpoints/last.ckpt"),
        (signal.SIGINT, "checkpoints/last.ckpt"),
        (signal.SIGKILL, "config.yaml"),  # before there is a checkpoint
    ],
)
def test_a_job_that_was_stopped_goes_on_to_the_same_end(job_config, tmp_path, sent, after):
    overrides = (*SHORT[:2], "trainer.max_epochs=12", *SHORT[3:], "logger=csv")
    run(job_config(*overrides, run="whole", short=False))
    folder = tmp_path / "stopped"
    command = [sys.executable, SCRIPT, *overrides, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    _wait_for(folder / after, process)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert not (folder / RESULT_NAME).exists()
    if "last" in after:  # which is whole, whenever that was
        assert last(folder)["epoch"] < 11, "it was stopped too late to tell anything"
    run(job_config(*overrides, run="stopped", short=False))
    assert_ended_alike(tmp_path / "whole", folder)
    assert not list(folder.rglob("*.part"))
    if "last" in after:
        assert (folder / "csv" / "metrics_part_1.csv").is_file(), "the table of the first part was lost"


@pytest.mark.ddp
@pytest.mark.slow
def test_sigterm_ends_a_job_of_two_processes_which_goes_on_to_the_same_end(job_config, tmp_path):
    overrides = (*SHORT[:2], "trainer.max_epochs=12", *SHORT[3:], "logger=none", "swap=sync")
    run(job_config(*overrides, "trainer=ddp_fork", run="whole", short=False))
    folder = tmp_path / "stopped"
    command = [sys.executable, SCRIPT, *overrides, "trainer=ddp", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        _wait_for(folder / "checkpoints" / "last.ckpt", process)
        process.terminate()
        output, _ = process.communicate(timeout=60)  # Lightning's own handler would wait for ever
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "goes on" in output
    assert last(folder)["epoch"] < 11, "it was stopped too late to tell anything"
    run(job_config(*overrides, "trainer=ddp_fork", run="stopped", short=False))
    assert_ended_alike(tmp_path / "whole", folder)


def test_a_finished_job_does_not_run_again(job_config, tmp_path):
    first = run(config(job_config, "run", "trainer.max_epochs=1"))
    result = tmp_path / "run" / RESULT_NAME
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(config(job_config, "run", "trainer.max_epochs=1")) == pytest.approx(first, nan_ok=True)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert json.loads(result.read_text())["metrics"] == first


def test_a_job_with_another_config_is_not_taken_for_the_finished_one(job_config, tmp_path):
    run(config(job_config, "run", "trainer.max_epochs=1"))
    other = run(config(job_config, "run", "trainer.max_epochs=1", "seed=1", "resume=false"))
    assert other == run(config(job_config, "fresh", "trainer.max_epochs=1", "seed=1"))


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
    io.save_checkpoint({"weights": torch.ones(3)}, path)

    def fails(checkpoint, file):
        file.write(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="the disk is full"):
        io.save_checkpoint({"weights": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert oct(os.stat(path).st_mode & 0o777) == oct(0o644)


class _Trainer:
    world_size, global_rank = 1, 0


def test_random_states_come_back_from_a_checkpoint(tmp_path):
    kept = RandomStates()
    checkpoint = {}
    kept.on_save_checkpoint(_Trainer, None, checkpoint)
    torch.save(checkpoint, tmp_path / "states.pt")
    drawn = (random.random(), numpy.random.rand(), torch.rand(1).item())
    resumed = RandomStates()
    resumed.on_load_checkpoint(_Trainer, None, torch.load(tmp_path / "states.pt", weights_only=True))
    resumed.on_fit_start(_Trainer, None)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == drawn


def test_a_checkpoint_of_other_ranks_or_without_states_changes_none():
    for checkpoint in ({}, {"random_states": [{}, {}]}):
        resumed = RandomStates()
        resumed.on_load_checkpoint(_Trainer, None, checkpoint)
        before = torch.get_rng_state()
        resumed.on_fit_start(_Trainer, None)
        assert torch.equal(torch.get_rng_state(), before)
