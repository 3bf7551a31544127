"""The shipped W&B workspace: built and written without a network, and every panel shows something that is logged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from helpers.wandb_runs import HOSTILE, history_of, logged, offline_run

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, short_names
from bnkit.dashboard.workspace import build, create, make, to_json

SCRIPT = Path(__file__).parents[2] / "scripts" / "workspace.py"

try:
    import wandb_workspaces.workspaces as ws
except ModuleNotFoundError:
    ws = None
needs_library = pytest.mark.skipif(ws is None, reason='wandb-workspaces is missing: pip install "bnkit[workspace]"')


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return offline_run(tmp_path_factory.mktemp("run"), history_of(HOSTILE))


def sections(text):
    return json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]


def panels(text):
    return [panel for section in sections(text) for panel in section["panels"]]


def asked(text):
    """Keys, and patterns of keys, that the panels of a workspace show; the x axis among them."""
    keys, patterns = set(), set()
    for panel in panels(text):
        config = panel["config"]
        if panel["viewType"] == "Run History Line Plot":
            assert config["metrics"] or config["useMetricRegex"]
            keys |= {config["xAxis"], *config["metrics"]}
            patterns |= {config["metricRegex"]} if "metricRegex" in config else set()
        elif panel["viewType"] == "Media Browser":
            keys |= set(config["mediaKeys"])
        elif panel["viewType"] == "Weave":
            keys.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
        else:
            assert panel["viewType"] == "Markdown Panel"
    return keys, patterns


def assert_resolves(text, log):
    keys, patterns = asked(text)
    there = logged(log)
    assert len(keys) > 3
    assert keys <= there
    assert all(any(re.search(pattern, key) for key in there) for pattern in patterns)


@needs_library
def test_it_has_the_four_sections_and_every_key_of_the_model_once():
    text = to_json(build("me", "bnkit", HOSTILE))
    assert [section["name"] for section in sections(text)] == ["BN health", "Where", "Why", "Cost"]
    lines = [key for panel in panels(text) for key in panel["config"].get("metrics", [])]
    layers = [f"{measure.prefix}/{short}" for measure in LAYER_KEYS for short in short_names(HOSTILE).values()]
    assert sorted(lines) == sorted([key.key for key in MODEL_KEYS] + layers)
    assert {panel["config"]["xAxis"] for panel in panels(text) if "metrics" in panel["config"]} == {
        "trainer/global_step"
    }


@needs_library
def test_the_median_and_the_worst_layer_are_one_plot():
    plots = [panel["config"] for panel in panels(to_json(build("me", "bnkit"))) if "metrics" in panel["config"]]
    [shift] = [plot for plot in plots if "bn/shift_worst" in plot["metrics"]]
    assert shift["metrics"] == ["bn/shift_median", "bn/shift_worst"]
    assert shift["chartTitle"] == "Mean shift, median and worst layer"
    assert shift["yAxisTitle"] == "running std"


@needs_library
def test_every_panels_key_is_in_a_real_offline_run(log):
    assert_resolves(to_json(build("me", "bnkit", HOSTILE)), log)


@needs_library
def test_panels_that_do_not_know_the_layers_find_them_by_a_pattern_that_takes_no_others(log):
    text = to_json(build("me", "bnkit"))
    assert_resolves(text, log)
    _, patterns = asked(text)
    found = {pattern: {key for key in logged(log) if re.search(pattern, key)} for pattern in patterns}
    expected = {f"{measure.prefix}/{short}" for measure in LAYER_KEYS for short in short_names(HOSTILE).values()}
    assert set().union(*found.values()) == expected
    assert all(len(keys) == len(HOSTILE) for keys in found.values())


@needs_library
def test_with_a_run_there_are_panels_for_what_it_logged_and_for_nothing_else(tmp_path):
    history = history_of(["a.bn", "b.bn"])
    kept = {"bn/shift_median", "bn/shift_worst", "bn_shift/a_bn", "bn_shift/b_bn", "bn/monitor_overhead"}
    history.metrics = {key: series for key, series in history.metrics.items() if key in kept}
    history.tables["alarms"].rows = []
    log = offline_run(tmp_path, history, prefix="my.exp")
    path = make(run=tmp_path, output=tmp_path / "workspace.json")
    text = Path(path).read_text(encoding="utf-8")
    assert_resolves(text, log)
    keys, _ = asked(text)
    tables = {"bn_table/layers", "bn_table/swaps", "bn_table/recalibrations", "bn_table/channels"}
    bnkit = kept | tables | {"bn_page/heatmap"}
    assert keys == {f"my.exp-{key}" for key in bnkit} | {"trainer/global_step"}


@needs_library
def test_a_prefix_and_two_hundred_layers_of_which_only_the_worst_are_logged_resolve_too(tmp_path):
    log = offline_run(tmp_path, history_of([f"blocks.{number}.bn" for number in range(200)]), prefix="my.exp")
    make(run=log, output=tmp_path / "workspace.json")
    text = (tmp_path / "workspace.json").read_text(encoding="utf-8")
    assert_resolves(text, log)
    _, patterns = asked(text)
    assert len(patterns) == len(LAYER_KEYS)


@needs_library
def test_the_layers_of_a_csv_get_a_line_each(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,bn_shift/a_bn,bn_shift/b_bn,train/loss\n1,2,3,4\n")
    make(run=tmp_path, output=tmp_path / "workspace.json")
    keys, _ = asked((tmp_path / "workspace.json").read_text())
    assert keys == {"bn_shift/a_bn", "bn_shift/b_bn", "bn_page/heatmap", "trainer/global_step"}


@needs_library
def test_the_same_workspace_is_the_same_file_which_the_library_parses_again():
    text = to_json(build("me", "bnkit", HOSTILE))
    assert text == to_json(build("me", "bnkit", HOSTILE))
    view = ws.internal.View.model_validate_json(text)
    assert to_json(ws.Workspace._from_model(view)) == text
    ids = [panel["__id__"] for panel in panels(text)]
    assert len(set(ids)) == len(ids)


@needs_library
def test_the_script_writes_the_file_in_a_process_of_its_own_without_key_or_network(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, SCRIPT, "output=workspace.json", "entity=me", "project=digits"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Workspace: workspace.json\n"
    assert (tmp_path / "workspace.json").read_text(encoding="utf-8") == to_json(build("me", "digits"))


@needs_library
def test_online_it_is_created_and_its_url_returned(monkeypatch):
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": "7"}}}

    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"default_entity": "me"}))
    monkeypatch.setattr(ws.internal, "upsert_view2", upsert)
    monkeypatch.setattr(ws.interface, "get_app_url", lambda api: "https://wandb.ai")
    assert make(project="digits").startswith("https://wandb.ai/me/digits?nw=")
    [view] = sent
    assert (view.entity, view.project, view.display_name) == ("me", "digits", "bnkit")


@needs_library
def test_what_wandb_refuses_is_one_sentence_with_the_cure(monkeypatch):
    def refuse(view):
        raise OSError("404 project not found")

    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(ws.internal, "upsert_view2", refuse)
    with pytest.raises(
        RuntimeError, match=r"create the workspace in me/digits \(404 project not found\): check entity"
    ):
        create(build("me", "digits"))


@needs_library
@pytest.mark.parametrize("entity", ["me", None])
def test_without_a_key_it_asks_nothing_and_says_how_to_go_on(monkeypatch, entity):
    monkeypatch.setattr(wandb, "login", lambda **options: options["prompt"])  # prompt=False: False, for want of a key
    with pytest.raises(ValueError, match=r"needs a W&B key and there is none.*`wandb login`.*output=workspace.json"):
        make(entity=entity)


@needs_library
def test_a_run_without_keys_of_bnkit_and_a_folder_that_is_not_there_are_refused(tmp_path):
    history = RunHistory()
    history.log({"train/loss": 1.0}, 1)
    history.save(tmp_path)
    with pytest.raises(ValueError, match=r"run=.* has no key of bnkit.*ActivationShiftMonitor"):
        make(run=tmp_path, output=tmp_path / "workspace.json")
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere; make it first"):
        make(output="nowhere/workspace.json")
    assert not (tmp_path / "workspace.json").exists()


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs wandb-workspaces .*pip install "bnkit\[workspace\]"'):
        make(output="workspace.json")
