"""The two scripts, as a user starts them: another working directory, no terminal, no account, no network needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PYTHONWARNINGS"))}
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        cwd=cwd,
        env=environment | {"HOME": str(cwd)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_train_then_recalibrate(tmp_path):
    trained = script("train.py", "--multirun", "debug=default", "seed=0,1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert trained.stdout.count("running average  recalibrated  difference") == 2
    assert "Best checkpoint: outputs/train/" in trained.stdout
    assert "W&B run: " in trained.stdout
    [sweep] = (tmp_path / "outputs" / "train").iterdir()
    for job in ("0", "1"):
        assert {path.name for path in (sweep / job).iterdir()} == {
            ".hydra", ".lock", "bn_history.json", "checkpoints", "config.yaml", "csv", "report.html", "result.json",
            "train.log", "wandb", "wandb_id.txt"
        }  # fmt: skip
        assert len(list((sweep / job / "wandb").glob("offline-run-*"))) == 1

    checkpoint = sweep / "0" / "checkpoints" / "last.ckpt"
    recalibrated = script("recalibrate.py", f"ckpt={checkpoint.relative_to(tmp_path)}", cwd=tmp_path)
    assert recalibrated.returncode == 0, recalibrated.stderr
    assert recalibrated.stderr == ""
    assert "network.stages.2.0.bn2" in recalibrated.stdout
    assert "Validation accuracy" in recalibrated.stdout
    assert torch.load(checkpoint.with_name("last-recalibrated.ckpt"), weights_only=True)["epoch"] == 0


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_a_failure(tmp_path):
    result = script("recalibrate.py", "ckpt=nowhere.ckpt", cwd=tmp_path)
    assert result.returncode == 1
    assert "\nckpt=nowhere.ckpt does not exist; give the path of a checkpoint" in result.stderr
    assert "Traceback" not in result.stderr
