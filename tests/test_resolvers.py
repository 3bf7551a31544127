"""What the configs can ask for."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bnkit.resolvers import command, register

import_module("bnkit.conf")  # registers them


@pytest.mark.parametrize(
    ("program", "module", "expected"),
    [
        ("/somewhere/bin/bnkit-train", None, "bnkit-train"),
        ("scripts/train.py", None, "python scripts/train.py"),
        ("/somewhere/scripts/train.py", "bnkit.scripts.train", "python -m bnkit.scripts.train"),
    ],
)
def test_a_command_is_named_as_it_was_called(monkeypatch, program, module, expected):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert command() == expected
    assert OmegaConf.create({"how": "${bnkit.command:} seed=1"}).how == f"{expected} seed=1"


def test_the_folder_of_the_configs_has_them():
    folder = OmegaConf.create({"where": "${bnkit.conf_folder:}"}).where
    assert (Path(folder) / "train.yaml").is_file()


def test_registering_again_changes_nothing():
    register()
    config = OmegaConf.create({"started": "${bnkit.started:}"})
    assert config.started == config.started
