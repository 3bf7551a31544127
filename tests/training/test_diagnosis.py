"""The command: the model of a checkpoint, of the configs, or anybody's."""

import json

import pytest
import torch
from torch import nn

from bnkit.training import run
from bnkit.training.diagnosis import diagnose_config


class Ported(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width, momentum=0.9))


PORTED = f"model._target_={__name__}.Ported"


def diagnosed(job_config, *overrides):
    return [finding.code for finding in diagnose_config(job_config(*overrides, config="diagnose"))]


def test_anybodys_model_by_its_class_with_its_arguments(job_config, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert diagnosed(job_config, PORTED, "+model.width=4", "batch_size=32", f"output={tmp_path / 'f.json'}") == [
            "BN211"
        ]
    assert "Ported, 1 BatchNorm layers\nBN211  warning  1\n" in caplog.text
    [finding] = json.loads((tmp_path / "f.json").read_text())
    assert finding["code"] == "BN211"
    assert diagnosed(job_config, PORTED, "ignore=[BN211]") == []


def test_a_model_of_the_configs_is_measured_on_their_data(job_config, caplog):
    with caplog.at_level("INFO"):
        assert diagnosed(job_config, "model=resnet", "data=digits", "batch_size=2") == ["BN101"]
    assert "as the sample tells" in caplog.text
    assert diagnosed(job_config, "model=resnet", "data=digits") == [], "the data's own batch size is 16"
    more_than_there_are = ["data.train_size=100", "sample=256"]
    assert diagnosed(job_config, "model=resnet", "data=digits", *more_than_there_are) == []


def test_a_checkpoint_with_its_runs_model_data_and_swap(job_config, tmp_path):
    run(job_config("swap=group", "callbacks.recalibration=null", "test=false"))
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert diagnosed(job_config, f"ckpt={checkpoint}") == [], "Group has no statistics to be off"
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"] = {}
    state["state_dict"]["network.stem.1.running_var"][0] = torch.nan
    torch.save(state, checkpoint)
    assert "BN201" in diagnosed(job_config, f"ckpt={checkpoint}")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([], ValueError, "no model to diagnose"),
        (["ckpt=nowhere.ckpt"], FileNotFoundError, "nowhere.ckpt does not exist"),
        ([PORTED, "fail_on=always"], ValueError, "fail_on=always"),
        ([PORTED, "ignore=[BN999]"], ValueError, "no rule 'BN999'"),
        ([PORTED, "output=nowhere/f.json"], FileNotFoundError, "does not exist"),
        (["model._target_=builtins.dict"], ValueError, "no torch module"),
    ],
)
def test_a_mistake_is_one_sentence(job_config, overrides, error, message):
    with pytest.raises(error, match=message):
        diagnosed(job_config, *overrides)


def test_fail_on_is_the_exit_code(job_config):
    with pytest.raises(SystemExit) as end:
        diagnosed(job_config, PORTED, "fail_on=warning")
    assert end.value.code == 1
    assert diagnosed(job_config, PORTED, "fail_on=error") == ["BN211"]
