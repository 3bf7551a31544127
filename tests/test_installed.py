"""bnkit as others have it: the wheel, built from an sdist, in a fresh environment, used from a folder elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
COMMANDS = sorted(f"bnkit-{path.stem}" for path in (CHECKOUT / "scripts").glob("[!_]*.py"))
OPTIONS = sorted(
    path.relative_to(CHECKOUT / "conf").as_posix() for path in (CHECKOUT / "conf" / "bnkit").rglob("*.yaml")
)

APP = """
import json, sys
from importlib.resources import files
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

here, built = Path.cwd(), {}
conf = Path(str(files("bnkit.conf")))
for path in sorted((conf / "bnkit").rglob("*.yaml")):
    group = path.parent.relative_to(conf)
    text = f"defaults:\\n  - /{group.as_posix()}@mine.it: {path.stem}\\n  - _self_\\n"
    (here / "app.yaml").write_text(text + "hydra:\\n  searchpath: [pkg://bnkit.conf]\\n")
    with initialize_config_dir(str(here), version_base="1.3"):
        cfg = compose("app")
    assert list(cfg) == ["mine"] and list(cfg.mine) == ["it"], cfg
    built[path.relative_to(conf).as_posix()] = type(instantiate(cfg.mine.it)).__name__
origins = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "bnkit" and module.__file__]
print(json.dumps({"built": built, "origins": origins}))
"""

HELP = """
import contextlib, io, json, sys
from importlib.metadata import distribution

said = {}
for command in distribution("bnkit").entry_points.select(group="console_scripts"):
    sys.argv = [f"/some/bin/{command.name}", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        command.load()()
    said[command.name] = text.getvalue()
print(json.dumps({"said": said, "heavy": [name for name in ("lightning", "wandb", "plotly") if name in sys.modules]}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with the wheel; the dependencies are those of this one, whose own bnkit it does not see."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("bnkit", "conf", "scripts"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    [wheel] = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    shutil.rmtree(source)
    return folder / "venv"


def call(*command, cwd, **environment):
    dropped = ("PYTHONPATH", "WANDB_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_another_app_composes_and_builds_every_option_of_every_group_for_others(environment, tmp_path):
    (tmp_path / "app.py").write_text(APP)
    answer = json.loads(call(environment / "bin" / "python", "app.py", cwd=tmp_path).splitlines()[-1])
    assert sorted(answer["built"]) == OPTIONS
    assert answer["built"]["bnkit/callback/recalibrate.yaml"] == "BatchNormRecalibration"
    assert answer["built"]["bnkit/norm/ghost.yaml"] == "Ghost"
    assert answer["built"]["bnkit/swap/ghost.yaml"] == "BatchNormSwap"
    assert answer["origins"]
    assert {Path(origin).is_relative_to(environment) for origin in answer["origins"]} == {True}, "not from the wheel"


@pytest.mark.slow
def test_each_command_says_what_it_does_and_how_to_call_and_override_it_without_a_checkout(environment, tmp_path):
    (tmp_path / "ask.py").write_text(HELP)
    answer = json.loads(call(environment / "bin" / "python", "ask.py", cwd=tmp_path).splitlines()[-1])
    assert sorted(answer["said"]) == COMMANDS
    for command, text in answer["said"].items():
        assert (environment / "bin" / command).is_file()
        assert text.count(f"  {command}") >= 2, f"{command}: examples by its own name"
        assert "override any by KEY=VALUE" in text
        assert f"{environment}" in text, "where the configs are"
        assert "powered by Hydra" not in text
    assert "swap=OPTION" in answer["said"]["bnkit-train"]
    assert "experiment: batch_size_2, ema, fashion_mnist" in answer["said"]["bnkit-train"]
    assert answer["heavy"] == [], "help that waits for these is slow"
    assert list(tmp_path.iterdir()) == [tmp_path / "ask.py"], "help writes nothing"


@pytest.mark.ddp
@pytest.mark.slow
def test_a_command_trains_on_two_processes_by_a_config_of_the_users_own(environment, tmp_path):
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "data: {train_size: 128, validation_size: 64}\n"
        "trainer: {max_epochs: 1}\n"
        "test: false\n"
        "threads: 1\n"
    )
    arguments = ("--config-dir", "my_conf", "experiment=mine", "trainer=ddp", "logger=csv")
    call(environment / "bin" / "bnkit-train", *arguments, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"my_conf", "outputs"}
    [run] = (tmp_path / "outputs" / "train").iterdir()
    assert {"report.html", "checkpoints", "csv", "result.json"} <= {path.name for path in run.iterdir()}
    call(environment / "bin" / "bnkit-report", f"run={run.relative_to(tmp_path)}", "output=page.html", cwd=tmp_path)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
