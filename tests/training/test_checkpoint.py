from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
import torch
from omegaconf import OmegaConf

from bnkit.training import Digits, ImageClassifier, ResNet, recalibrate_checkpoint, run

STATISTICS = ("running_mean", "running_var")


@pytest.fixture
def checkpoint(job_config, tmp_path):
    """A run's last checkpoint, with statistics that are off."""
    run(job_config("callbacks.recalibration=null", "test=false"))
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    if isinstance(one, Mapping):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))  # NaN is what is not known


def recalibrate(job_config, checkpoint, *overrides):
    return recalibrate_checkpoint(job_config(f"ckpt={checkpoint}", *overrides, config="recalibrate"))


def test_a_new_checkpoint_stands_beside_with_other_statistics_and_nothing_else_changed(job_config, checkpoint, caplog):
    original = checkpoint.read_bytes()
    with caplog.at_level("INFO"):
        output = recalibrate(job_config, checkpoint)
    assert output == checkpoint.with_name("last-recalibrated.ckpt")
    assert checkpoint.read_bytes() == original
    assert {path.name for path in checkpoint.parent.iterdir()} == {"epoch_000.ckpt", "last.ckpt", output.name}
    old, new = torch.load(checkpoint, weights_only=True), torch.load(output, weights_only=True)
    for name, value in old["state_dict"].items():
        assert torch.equal(value, new["state_dict"][name]) != name.endswith(STATISTICS), name
        new["state_dict"][name] = value
    assert same(old, new)
    assert "network.stem.1" in caplog.text  # the drift table
    assert "before" in caplog.text


def test_the_statistics_of_the_first_layer_are_those_of_the_whole_training_split(job_config, checkpoint):
    output = recalibrate(job_config, checkpoint, "batch_size=1077")
    state = torch.load(output, weights_only=True)["state_dict"]
    module = ImageClassifier(ResNet(), num_classes=10, optimizer=torch.optim.SGD)
    module.load_state_dict(state)
    with torch.no_grad():
        x = module.network.stem[0](Digits(batch_size=4).split("train").images).double()
    assert torch.allclose(state["network.stem.1.running_mean"].double(), x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(state["network.stem.1.running_var"].double(), x.var((0, 2, 3), correction=0), rtol=1e-6)


def test_training_resumes_from_the_new_checkpoint(job_config, checkpoint):
    output = recalibrate(job_config, checkpoint)
    assert "val/accuracy" in run(job_config("trainer.max_epochs=2", f"ckpt_path={output}", run="rest"))


def test_other_data_and_another_output_can_be_named(job_config, checkpoint, tmp_path):
    output = recalibrate(job_config, checkpoint, "data=digits", "data.train_size=64", f"output={tmp_path / 'new.ckpt'}")
    assert output == tmp_path / "new.ckpt"
    assert torch.load(output, weights_only=True)["epoch"] == 0


def test_a_checkpoint_that_is_not_there_is_named(job_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        recalibrate(job_config, tmp_path / "nowhere.ckpt")


def test_the_checkpoint_itself_is_never_overwritten(job_config, checkpoint):
    original = checkpoint.read_bytes()
    link = checkpoint.with_name("link.ckpt")
    link.symlink_to(checkpoint)
    for output in (checkpoint, link):
        with pytest.raises(ValueError, match="is the checkpoint itself, which is never overwritten"):
            recalibrate(job_config, checkpoint, f"output={output}")
    assert checkpoint.read_bytes() == original


def test_weights_that_do_not_fit_the_config_are_one_sentence(job_config, checkpoint):
    config = checkpoint.parent.parent / "config.yaml"
    cfg = OmegaConf.load(config)
    for change in ({"width": 8}, {"depths": [1, 1, 1, 1]}):
        OmegaConf.save(OmegaConf.merge(cfg, {"model": {"network": change}}), config)
        with pytest.raises(ValueError, match=r"do not fit the model of its config \(for one: .*; set config=") as error:
            recalibrate(job_config, checkpoint)
        assert "\n" not in str(error.value)


def test_a_checkpoint_without_its_config_says_how_to_name_it(job_config, checkpoint):
    (checkpoint.parent.parent / "config.yaml").rename(checkpoint.parent.parent / "moved.yaml")
    with pytest.raises(FileNotFoundError, match=r"set config= to the config\.yaml of the run that saved"):
        recalibrate(job_config, checkpoint)
    assert recalibrate(job_config, checkpoint, f"config={checkpoint.parent.parent / 'moved.yaml'}").is_file()


class Payload:
    """What a malicious checkpoint does: run code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_of_tensors_is_refused_and_runs_nothing(
    job_config, tmp_path, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.ckpt"
    if content is None:
        torch.save({"state_dict": Payload()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.ckpt is not a checkpoint that loads with weights_only=True") as error:
        recalibrate(job_config, path)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.ckpt"]


def test_an_interrupted_write_leaves_nothing_behind(job_config, checkpoint, monkeypatch):
    def interrupted(contents, file):
        file.write(b"half")
        raise KeyboardInterrupt

    files = sorted(checkpoint.parent.iterdir())
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(job_config, checkpoint)
    assert sorted(checkpoint.parent.iterdir()) == files
