"""The commands that the documents show: that each is one that exists, and composes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# Told apart from ours, and not run: they install, or belong to other projects.
KNOWN = {"pip", "apt-get", "bash", "cd", "mkdir", "pytest", "ruff", "mypy", "mkdocs", "wandb"}
LAUNCHERS = {"torchrun", "srun"}
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "norm_batch_optuna": "hydra_optuna_sweeper",
}


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, without comments, each as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def inline_commands(text: str) -> Iterator[list[str]]:
    """The commands of ours within the text, such as `python scripts/train.py fault=inputs`."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        if re.match(r"(python scripts/|bnkit-|torchrun )", code):
            yield shlex.split(" ".join(code.split()))


def check_command(words: list[str]) -> None:
    """Raise AssertionError for a command that does not exist, or does not compose."""
    program, *arguments = words
    if program == "pip":
        _check_extras(arguments)
    elif program in LAUNCHERS:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        _check_job(Path(words[script]).stem, words[script + 1 :])
    elif program == "python" and arguments[0].startswith("scripts/"):
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
        _check_job(Path(arguments[0]).stem, arguments[1:])
    elif program == "python":
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
    elif program.startswith("bnkit-"):
        assert f"\n{program} = " in PROJECT, f"{program} is no command of this project"
        _check_job(program.removeprefix("bnkit-"), arguments)
    else:
        assert program in KNOWN, f"{' '.join(words)!r}: say in tests/helpers/commands.py how it is checked"


def _check_extras(arguments: list[str]) -> None:
    for extra in re.findall(r"\[([a-z,]+)\]", " ".join(arguments)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", PROJECT, re.MULTILINE), f"there is no extra {name!r}"


def _check_job(name: str, arguments: list[str]) -> None:
    """Compose what the command would; of a sweep, its first job."""
    flags = [word for word in arguments if word.startswith("-")]
    assert set(flags) <= {"--multirun", "--help", "--cfg"}, flags
    # "…" and capitals stand for what is the reader's.
    given = [word.replace("…", "X") for word in arguments if "=" in word]
    overrides = []
    for override in OverridesParser.create().parse_overrides(given):
        for plugin in (PLUGINS[part] for part in PLUGINS if override.input_line and override.input_line.endswith(part)):
            pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"{plugin} is in bnkit[sweeps]")
        if override.is_sweep_override():
            override_name = override.input_line.partition("=")[0]
            overrides.append(f"{override_name}={next(iter(override.sweep_string_iterator()))}")
        else:
            overrides.append(override.input_line)
    GlobalHydra.instance().clear()
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        compose(name, overrides=overrides, return_hydra_config=True)


def compose_app(text: str) -> None:
    """A Hydra app's primary config composes, and every class that it names exists."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "app.yaml").write_text(text, encoding="utf-8")
        GlobalHydra.instance().clear()
        with initialize_config_dir(folder, version_base="1.3"):
            config = compose("app")
    found = list(targets(OmegaConf.to_container(config)))
    assert found
    for target in found:
        get_object(target)


def targets(node: DictConfig | dict | list | object) -> Iterator[str]:
    """Every ``_target_`` below."""
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)
