"""What a user got wrong is told in a sentence; what went wrong in the program keeps its traceback."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import bnkit
from bnkit import mistakes
from bnkit.mistakes import Mistake, names_missing_plugins, told_plainly

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_what_bnkit_raises_on_purpose_is_told_as_it_is():
    with pytest.raises(Mistake, match=r"^tolerance must be a positive fraction.* -1\.$") as told, told_plainly():
        bnkit.recalibrate(nn.BatchNorm1d(2), [], tolerance=-1)
    assert isinstance(told.value, CompactHydraException)
    assert isinstance(told.value.__context__, ValueError)


def test_what_goes_wrong_in_a_call_keeps_its_type_and_traceback():
    with pytest.raises(ValueError, match="invalid literal"), told_plainly():
        int("x")
    with pytest.raises(AttributeError), told_plainly():
        bnkit.report.Report.from_nowhere()


def test_an_assertion_within_bnkit_is_no_mistake_of_the_user():
    scope = {"__name__": "bnkit.somewhere"}
    exec("def broken():\n    assert 1 == 2", scope)
    with pytest.raises(AssertionError), told_plainly():
        scope["broken"]()


def test_a_raise_of_somebody_else_is_left_as_it_is():
    with pytest.raises(ValueError, match="theirs"), told_plainly():
        raise ValueError("theirs")


def test_a_missing_value_is_named():
    with pytest.raises(Mistake, match=r"^outer\.ckpt= is missing; .* --help"), told_plainly():
        OmegaConf.create({"outer": {"ckpt": "???"}}).outer.ckpt  # noqa: B018


def test_a_value_that_a_class_refuses_is_told_with_its_place_in_the_config():
    config = OmegaConf.create({"rules": {"_target_": "bnkit.norms.Ghost", "size": 0}})
    with pytest.raises(Mistake, match=r"^rules: Ghost's size .* not 0\.$"), told_plainly():
        instantiate(config)


def test_a_class_that_cannot_be_imported_is_told_with_the_cure():
    config = OmegaConf.create({"model": {"_target_": "nowhere.Net"}})
    with pytest.raises(Mistake, match=r"^model\._target_=nowhere\.Net cannot be .*PYTHONPATH"), told_plainly():
        instantiate(config)


def test_a_mistake_comes_back_from_another_process_whole():
    assert str(pickle.loads(pickle.dumps(Mistake("lower it")))) == "lower it"


@pytest.mark.parametrize("argument", ["launcher=joblib", "hparams_search=norm_batch_optuna", "hydra/sweeper=optuna"])
def test_a_plugin_that_is_not_installed_is_told_with_its_extra(monkeypatch, capsys, argument):
    monkeypatch.setattr(sys, "argv", ["bnkit-train", "--multirun", argument, "seed=0,1"])
    monkeypatch.setattr(mistakes, "find_spec", lambda name: None)
    app = names_missing_plugins(lambda: "ran")
    with pytest.raises(SystemExit) as end:
        app()
    assert end.value.code == f'{argument} needs a plugin of Hydra that is not installed: pip install "bnkit[sweeps]"'
    monkeypatch.setattr(mistakes, "find_spec", lambda name: object())
    assert app() == "ran"


def command(name, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_command_fails_with_the_sentence_and_without_a_traceback(tmp_path):
    result = command("report.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "run= is missing; " in result.stderr
    assert "Traceback" not in result.stderr
    full = command("report.py", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert full.returncode == 1
    assert "MissingMandatoryValue" in full.stderr
    assert "Traceback" in full.stderr
