"""Every config that ships composes, and names things that exist."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import bnkit
from bnkit import callbacks, norms
from bnkit.callbacks import ActivationShiftMonitor, BatchNormRecalibration, BatchNormSwap
from bnkit.norms import Frozen, Ghost, Renorm, Spec

CONF = Path(str(files("bnkit.conf")))
JOB_GROUPS = (
    "callbacks",
    "data",
    "debug",
    "experiment",
    "fault",
    "hparams_search",
    "launcher",
    "logger",
    "model",
    "recalibration",
    "trainer",
)
PLUGINS = {  # what an option needs of the extra bnkit[sweeps]
    "joblib": "hydra_joblib_launcher",
    "norm_batch_optuna": "hydra_optuna_sweeper",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
}
SWAPS = sorted(path.stem for path in (CONF / "bnkit" / "swap").glob("*.yaml"))
SPECS = {
    "domain": ["Domain"],
    "frozen": ["Frozen"],
    "ghost": ["Ghost"],
    "group": ["Group"],
    "group_ws": ["Group"],
    "moving_average": ["MovingAverage"],
    "none": [],
    "norm_batch": ["NormBatch"],
    "renorm": ["Renorm"],
    "sync": ["Sync"],
}
CALLBACKS = sorted(path.stem for path in (CONF / "bnkit" / "callback").glob("*.yaml"))
NORMS = sorted(path.stem for path in (CONF / "bnkit" / "norm").glob("*.yaml"))
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml"))
OPTIONS = [(group, path.stem) for group in JOB_GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        return compose(name, overrides=list(overrides))


def targets(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every ``_target_`` below ``node`` and the arguments that it gets."""
    if isinstance(node, dict):
        if node.get("_target_") is not None:
            yield node["_target_"], {key: value for key, value in node.items() if not key.startswith("_")}
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def check_targets(cfg: DictConfig, *, resolve: bool = True) -> None:
    for target, arguments in targets(OmegaConf.to_container(cfg, resolve=resolve)):
        signature = inspect.signature(get_object(target))
        signature.bind_partial(**arguments)  # raises where an argument is misspelt
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            continue
        assert set(arguments) <= set(signature.parameters), target


def test_every_folder_of_the_job_is_tested_here():
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    assert folders == {".", "bench", "bnkit/callback", "bnkit/norm", "bnkit/swap", "hydra/help", *JOB_GROUPS}


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "bench").glob("*.yaml")))
def test_every_benchmark_composes_by_its_name(option):
    assert composed("benchmark", f"bench={option}").bench == option


def require(option: str) -> None:
    if option in PLUGINS:
        pytest.importorskip(f"hydra_plugins.{PLUGINS[option]}", reason=f"{PLUGINS[option]} is in bnkit[sweeps]")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_names_what_exists(group, option, tmp_path):
    require(option)
    cfg = composed("train", f"{group}={option}", f"run_dir={tmp_path}")
    check_targets(cfg)
    if (group, option) == ("recalibration", "none"):
        assert cfg.callbacks.recalibration is None
    else:
        assert cfg.callbacks.recalibration._target_ == "bnkit.callbacks.BatchNormRecalibration"


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
def test_another_app_launches_by_these_configs_too(option, tmp_path):
    require(option)
    (tmp_path / "app.yaml").write_text(
        "defaults:\n  - _self_\n  - launcher: null\nhydra:\n  searchpath: [pkg://bnkit.conf]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("app", overrides=[f"launcher={option}"], return_hydra_config=True)
    assert cfg.hydra.runtime.choices["hydra/launcher"] == option


@pytest.mark.parametrize("option", ["norm_batch", "norm_batch_optuna"])
def test_every_normalization_batch_of_a_search_fits_into_every_batch(option):
    space = OmegaConf.load(CONF / "hparams_search" / f"{option}.yaml").hydra.sweeper.params
    numbers = {key: [int(text) for text in re.findall(r"\d+", str(value))] for key, value in space.items()}
    assert max(numbers["callbacks.swap.rules.size"]) <= min(numbers["data.batch_size"])
    assert re.findall(r"default|none", space.recalibration) == ["default", "none"]


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_a_checkpoint_can_be_recalibrated_on_any_data(option):
    check_targets(composed("recalibrate", "ckpt=some.ckpt", f"data={option}"))


def test_the_defaults_are_what_the_readme_promises(tmp_path):
    cfg = composed("train", f"run_dir={tmp_path}")
    assert cfg.data._target_ == "bnkit.training.Digits"
    assert cfg.trainer.accelerator == "cpu"
    assert set(cfg.logger) == {"csv", "wandb"}
    assert cfg.logger.wandb.offline is True
    assert cfg.logger.wandb.save_dir == str(tmp_path)


def test_each_callback_and_each_spec_has_a_config():
    named = {OmegaConf.load(CONF / "bnkit" / "callback" / f"{option}.yaml")["_target_"] for option in CALLBACKS}
    assert named == {f"bnkit.callbacks.{name}" for name in callbacks.__all__}
    named = {OmegaConf.load(CONF / "bnkit" / "norm" / f"{option}.yaml")["_target_"] for option in NORMS}
    specs = [name for name in norms.__all__ if isinstance(vars(norms)[name], type)]
    assert named == {f"bnkit.norms.{name}" for name in specs if issubclass(vars(norms)[name], Spec) and name != "Spec"}


@pytest.mark.parametrize("option", CALLBACKS)
def test_the_callback_config_has_every_knob_at_its_default(option):
    cfg = OmegaConf.load(CONF / "bnkit" / "callback" / f"{option}.yaml")
    parameters = inspect.signature(get_object(cfg["_target_"])).parameters
    assert {key: value for key, value in cfg.items() if key != "_target_"} == {
        name: parameter.default for name, parameter in parameters.items()
    }


@pytest.mark.parametrize("option", NORMS)
def test_the_config_of_a_spec_has_every_knob(option):
    cfg = OmegaConf.load(CONF / "bnkit" / "norm" / f"{option}.yaml")
    spec = instantiate(cfg)
    assert set(cfg) == {"_target_", *(field.name for field in dataclasses.fields(spec))}


def test_the_recalibration_script_has_every_knob_at_its_default():
    cfg = composed("recalibrate", "ckpt=some.ckpt").recalibration
    parameters = inspect.signature(bnkit.recalibrate).parameters
    options = {name: parameter.default for name, parameter in parameters.items() if name in cfg}
    assert dict(cfg) == options
    assert set(parameters) - set(cfg) == {"model", "batches", "forward", "process_group"}


@pytest.mark.parametrize("path", sorted((CONF / "bnkit").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_knob_of_a_group_for_others_has_a_comment(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert lines[0].startswith("# ")
    for before, line in pairwise(lines):
        if not line.startswith(("#", "_target_", "defaults:", "- /bnkit/", "- _self_")):
            assert before.startswith("# "), f"{path.name}: {line}"


@pytest.mark.parametrize("option", SWAPS)
def test_every_swap_composes_by_its_short_name_and_is_built(option):
    cfg = composed("train", f"swap={option}", "run_dir=run")
    check_targets(cfg)
    parameters = inspect.signature(BatchNormSwap).parameters
    assert set(cfg.callbacks.swap) == {"_target_", *parameters}
    callback = instantiate(cfg.callbacks.swap, _convert_="all")
    assert isinstance(callback, BatchNormSwap)
    assert [type(spec).__name__ for spec in callback.schedule.specs()] == SPECS[option]
    for spec in callback.schedule.specs():
        given = next(node for target, node in targets(OmegaConf.to_container(cfg.callbacks.swap)) if "norms" in target)
        assert set(given) == {field.name for field in dataclasses.fields(spec)}, "every knob of the spec is there"


def test_the_job_swaps_nothing_by_itself():
    assert "swap" not in composed("train", "run_dir=run").callbacks
    assert set(SPECS) == set(SWAPS)


def another_app(folder: Path, *defaults: str, overrides: tuple[str, ...] = (), values: str = "") -> DictConfig:
    """The config of an app that adds these lines to its defaults list and bnkit's configs to its search path."""
    lines = "".join(f"  - {line}\n" for line in defaults)
    (folder / "app.yaml").write_text(
        f"defaults:\n{lines}  - _self_\nhydra:\n  searchpath: [pkg://bnkit.conf]\n{values}"
    )
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("app", overrides=list(overrides))


def rules_of(node: DictConfig) -> dict[str, Any]:
    """By when they begin; built as other people's projects build their callbacks, without ``_convert_``."""
    return instantiate(node).schedule._stages


def test_another_app_composes_a_swap_by_two_lines(tmp_path):
    values = "callbacks:\n  mine:\n    rules:\n      size: 5\n"
    cfg = another_app(tmp_path, "/bnkit/swap@callbacks.mine: ghost", values=values)
    assert list(cfg.callbacks) == ["mine"]
    assert rules_of(cfg.callbacks.mine) == {0: {"*": Ghost(5)}}


def test_another_app_composes_the_callback_and_what_normalises_instead(tmp_path):
    lines = ("/bnkit/callback@callbacks.swap: swap", "/bnkit/norm@callbacks.swap.rules: ghost")
    cfg = another_app(tmp_path, *lines, overrides=("callbacks.swap.rules.size=4",))
    assert rules_of(cfg.callbacks.swap) == {0: {"*": Ghost(4)}}
    cfg = another_app(tmp_path, *lines, overrides=("bnkit/norm@callbacks.swap.rules=renorm",))
    assert rules_of(cfg.callbacks.swap) == {0: {"*": Renorm()}}


def test_rules_by_pattern_and_schedules_are_built_without_converting_them_first(tmp_path):
    lines = ("/bnkit/callback@callbacks.swap: swap", "/bnkit/norm@late: frozen")
    values = (
        "callbacks:\n"
        "  swap:\n"
        "    rules: {stem.*: null, net.bn1: {_target_: bnkit.norms.Ghost, size: 3}, '*': Renorm(2.0)}\n"
        "    schedule: {2: '${late}', 0.5: null}\n"
    )
    cfg = another_app(tmp_path, *lines, values=values)
    first = {"stem.*": None, "net.bn1": Ghost(3), "*": Renorm(2.0)}
    assert rules_of(cfg.callbacks.swap) == {0: first, 2: {"*": Frozen()}, 0.5: None}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("swap=ghost", "callbacks.swap.rules.size=4"), {0: {"*": Ghost(4)}}),
        (("swap=ghost", "callbacks.swap.rules=Frozen"), {0: {"*": Frozen()}}),
        (("swap=ghost", "callbacks.swap.schedule={3: Frozen}"), {0: {"*": Ghost(8)}, 3: {"*": Frozen()}}),
        (("swap=none", "callbacks.swap.schedule={0.5: Frozen}"), {0: {}, 0.5: {"*": Frozen()}}),
        (("swap=frozen",), {0: {}, 0.75: {"*": Frozen()}}),
    ],
)
def test_a_swap_is_overridden_from_the_command_line(overrides, expected):
    assert rules_of(composed("train", *overrides, "run_dir=run").callbacks.swap) == expected


def test_another_app_composes_the_callback_by_two_lines(tmp_path):
    values = "callbacks:\n  recalibration:\n    every_n_epochs: 3\n"
    cfg = another_app(tmp_path, "/bnkit/callback@callbacks.recalibration: recalibrate", values=values)
    callback = instantiate(cfg.callbacks.recalibration)
    assert isinstance(callback, BatchNormRecalibration)
    assert callback.every_n_epochs == 3


def test_another_app_composes_the_monitor_by_two_lines(tmp_path):
    values = "callbacks:\n  mine:\n    every_n_steps: 3\n"
    cfg = another_app(tmp_path, "/bnkit/callback@callbacks.mine: monitor", values=values)
    callback = instantiate(cfg.callbacks.mine)
    assert isinstance(callback, ActivationShiftMonitor)
    assert callback._options["every_n_steps"] == 3


@pytest.mark.parametrize("name", PRIMARY)
def test_each_script_names_what_exists(name):
    check_targets(composed(name), resolve=False)


@pytest.mark.parametrize("name", PRIMARY)
def test_each_script_has_its_config_and_help_of_its_own(name):
    assert (Path(__file__).parents[2] / "scripts" / f"{name}.py").is_file()
    with initialize_config_module("bnkit.conf", version_base="1.3"):
        shown = compose(name, return_hydra_config=True, overrides=["hydra.job.name=x"]).hydra
    assert shown.runtime.choices["hydra/help"] in ("bnkit", "bnkit_values")
    assert "powered by Hydra" not in shown.help.header
    assert shown.help.header.count(f"\n  {shown.help.app_name}") >= 2, "examples"


def test_the_job_writes_its_page_into_the_run_directory(tmp_path):
    cfg = composed("train", f"run_dir={tmp_path}")
    assert cfg.callbacks.shift_monitor._target_ == "bnkit.callbacks.ActivationShiftMonitor"
    assert cfg.callbacks.shift_monitor.report_dir == str(tmp_path)


def test_the_page_and_the_workspace_have_configs():
    assert composed("report", "run=some/run").output is None
    assert composed("workspace").project == "bnkit"
