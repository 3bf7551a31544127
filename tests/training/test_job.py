from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from bnkit.training import Digits, ImageClassifier, ResNet, job, run
from bnkit.training.launching import forget_the_last_port, refuse_processes_that_repeat_the_sweep


def records(run_dir: Path, kind: str) -> list[dict]:
    """Read records of an offline W&B run back, as `wandb sync` would send them."""
    [log] = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", log]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [record[kind] for record in map(json.loads, output.splitlines()) if record["type"] == kind]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_everything_in_its_directory(job_config, tmp_path):
    mode = os.environ.get("WANDB_MODE")
    metrics = run(job_config("logger=many"))
    run_dir = tmp_path / "run"
    assert {"val/accuracy", "val/accuracy_running_average", "val/accuracy_best", "test/accuracy"} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())

    saved = OmegaConf.load(run_dir / "config.yaml")
    assert saved.trainer.max_epochs == 1
    assert saved.model.network.num_classes == 10  # resolved

    with (run_dir / "csv" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    logged = [float(row["val/accuracy"]) for row in table if row["val/accuracy"]]
    assert logged == pytest.approx([metrics["val/accuracy"]])
    assert any(row["val/accuracy_running_average"] for row in table)
    keys = set(table[0]) - {"epoch", "step"}
    assert all(key.count("/") == 1 for key in keys), keys

    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["epoch_000.ckpt", "last.ckpt"]
    assert torch.load(run_dir / "checkpoints" / "epoch_000.ckpt", weights_only=True)["epoch"] == 0

    assert [record["exit_code"] for record in records(run_dir, "exit")] == [0]
    assert wandb.run is None
    assert os.environ.get("WANDB_MODE") == mode  # WandbLogger(offline=True) sets it for the whole process


def test_a_failing_job_ends_its_wandb_run_as_failed_and_the_next_is_another(job_config, tmp_path, monkeypatch):
    def fail(self, batch, batch_idx):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(job_config("logger=wandb", run="first"))
    assert wandb.run is None
    run(job_config("logger=wandb", run="second"))
    [first], [second] = records(tmp_path / "first", "run"), records(tmp_path / "second", "run")
    assert first["run_id"] != second["run_id"]
    assert [record["exit_code"] for record in records(tmp_path / "first", "exit")] == [1]
    assert [record["exit_code"] for record in records(tmp_path / "second", "exit")] == [0]


def test_wandb_online_without_a_key_stops_at_once_and_asks_nothing(job_config, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda **options: options["prompt"])  # prompt=False: False, for want of a key
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"needs a W&B key and there is none: run `wandb login`"):
        run(job_config("logger=wandb", "logger.wandb.offline=false"))
    assert not (tmp_path / "run" / "wandb").exists()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(job_config, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(job_config(f"seed={seed}", run=name))
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["network.stem.0.weight"], three["network.stem.0.weight"])


def test_a_resumed_run_goes_on_where_the_checkpoint_stopped(job_config, tmp_path, capsys):
    run(job_config("trainer.max_epochs=1", run="half"))
    capsys.readouterr()
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    run(job_config("trainer.max_epochs=2", f"ckpt_path={last}", "logger=csv", run="rest"))
    table = capsys.readouterr().out.split("difference")[1]
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["0", "1", "mean"]  # the first half's row too
    with (tmp_path / "rest" / "csv" / "metrics.csv").open() as file:
        trained = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert {row["epoch"] for row in trained} == {"1"}
    assert [int(row["step"]) for row in trained] == list(range(10, 20))
    half, rest = (torch.load(path, weights_only=True) for path in (last, tmp_path / "rest/checkpoints/last.ckpt"))
    assert (half["global_step"], rest["global_step"]) == (10, 20)


def test_a_checkpoint_to_resume_from_that_is_not_there_is_named(job_config):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=nowhere\.ckpt does not exist"):
        run(job_config("ckpt_path=nowhere.ckpt"))


def test_the_averaged_weights_that_were_validated_are_those_tested(job_config, tmp_path):
    metrics = run(job_config("experiment=ema", "trainer.max_epochs=3", "~trainer.limit_test_batches", "seed=3"))
    [best] = (tmp_path / "run" / "checkpoints").glob("epoch_*.ckpt")
    module = ImageClassifier(ResNet(), num_classes=10, optimizer=torch.optim.SGD)
    module.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    module.eval()
    data = Digits(batch_size=16).split("test")
    with torch.no_grad():
        accuracy = (module(data.images).argmax(1) == data.labels).float().mean()
    assert metrics["test/accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


def test_without_recalibration_the_job_trains_all_the_same(job_config):
    metrics = run(job_config("callbacks.recalibration=null", "test=false"))
    assert "val/accuracy" in metrics
    assert "val/accuracy_running_average" not in metrics
    assert not any(name.startswith("test/") for name in metrics)


@pytest.mark.filterwarnings("ignore:BatchNormRecalibration has nothing to do")  # group normalization has no statistics
@pytest.mark.parametrize(
    "swap", ["domain", "frozen", "ghost", "group", "group_ws", "moving_average", "none", "norm_batch", "renorm", "sync"]
)
def test_the_job_trains_with_any_other_batch_norm(job_config, tmp_path, swap):
    metrics = run(job_config(f"swap={swap}"))
    assert 0 <= metrics["test/accuracy"] <= 1
    assert (
        weights(tmp_path / "run").keys()
        >= ImageClassifier(ResNet(), num_classes=10, optimizer=None).state_dict().keys()
    )
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert ("BatchNormSwap" in state) == (swap != "none")


def test_processes_that_would_repeat_the_sweep_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")  # of a job before
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        overrides = ["trainer=ddp", "trainer.strategy=ddp", "logger=none", f"run_dir={tmp_path}"]
        cfg = compose("train", overrides=["hydra.mode=MULTIRUN", *overrides], return_hydra_config=True)
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(cfg)
    try:
        with pytest.raises(ValueError, match=r"trainer\.strategy=ddp .* use trainer=ddp_spawn"):
            run(cfg)
        assert not (tmp_path / "config.yaml").exists()
        trainer = job.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
        refuse_processes_that_repeat_the_sweep(trainer)  # accepts
        forget_the_last_port(trainer)
        assert "MASTER_PORT" not in os.environ, "jobs that run at a time would meet there"
    finally:
        holder.cfg = before


@pytest.mark.ddp
def test_two_processes_train_test_and_report(job_config, tmp_path):
    metrics = run(job_config("trainer=ddp", "trainer.strategy=ddp_fork", "logger=many"))
    assert {"val/accuracy", "val/accuracy_running_average", "test/accuracy"} <= set(metrics)
    logged = [json.dumps(record) for record in records(tmp_path / "run", "history")]
    assert any("val/accuracy_running_average" in record for record in logged)
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        assert any(row["val/accuracy_running_average"] for row in csv.DictReader(file))
