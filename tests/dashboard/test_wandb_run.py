"""What W&B is told of a run, read back from its offline log with W&B's own tool."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.wandb_runs import HOSTILE, history_of, log_file, offline_logger, offline_run, records, rows

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, short_names
from bnkit.dashboard.wandb_run import HEATMAP, STEP, TABLE, are_names, define_metrics, log_history


@pytest.fixture(scope="module")
def history():
    return history_of(HOSTILE)


@pytest.fixture(scope="module")
def log(history, tmp_path_factory):
    return offline_run(tmp_path_factory.mktemp("run"), history)


def definitions(log):
    return {record["name"]: record for record in records(log, "metric") if "name" in record}


def items(log):
    return [record["item"] for record in records(log, "history")]


def read_media(log, item, key):
    return (log.parent / "files" / item[f"{key}.path"]).read_text(encoding="utf-8")


def test_every_key_is_defined_by_its_exact_name_over_the_global_step_and_only_the_layers_are_hidden(log):
    model = {key.key for key in MODEL_KEYS}
    layers = {f"{measure.prefix}/{short}" for measure in LAYER_KEYS for short in short_names(HOSTILE).values()}
    found = definitions(log)
    assert found.keys() == model | layers | {STEP}
    assert {name for name, record in found.items() if record.get("step_metric") == STEP} == model | layers
    assert {name for name, record in found.items() if record["options"].get("hidden")} == layers


def test_all_that_was_logged_was_defined_and_has_one_slash_and_no_dot(log):
    scalars = {key for item in items(log) for key in item if key.startswith("bn") and "._" not in key}
    scalars = {key for key in scalars if not key.startswith((HEATMAP, TABLE))}
    assert len(scalars) == len(MODEL_KEYS) + len(LAYER_KEYS) * len(HOSTILE)
    assert scalars <= definitions(log).keys()
    assert all(key.count("/") == 1 and "." not in key for key in scalars)


def test_the_config_says_which_layer_a_key_names(log):
    [config] = [record["update"] for record in records(log, "config")]
    assert config["bn_layers"] == {short: layer for layer, short in short_names(HOSTILE).items()}


def test_the_last_rows_are_the_heatmap_and_every_table_at_the_last_step(log, history):
    last = items(log)[-1]
    assert last[STEP] == 35
    assert last[f"{HEATMAP}._type"] == "plotly-file"
    assert {key.removesuffix("._type") for key, value in last.items() if value == "table-file"} == {
        TABLE + name for name in history.tables
    }


def test_the_heatmap_has_every_layer_and_plain_lists_that_any_browser_reads(log):
    text = read_media(log, items(log)[-1], HEATMAP)
    [trace] = [trace for trace in json.loads(text)["data"] if trace["type"] == "heatmap"]
    assert "bdata" not in text
    assert len(trace["z"]) == len(HOSTILE)
    assert trace["x"] == [10, 20, 35]


def test_the_tables_have_the_same_cells_and_what_is_not_known_is_none(log, history):
    for name, table in history.tables.items():
        content = json.loads(read_media(log, items(log)[-1], TABLE + name))
        assert content["columns"] == list(table.columns)
        assert [tuple(row) for row in content["data"]] == table.rows
    assert any(cell is None for row in history.tables["layers"].rows for cell in row)


def test_a_column_of_several_types_and_a_table_of_many_rows_are_logged_whole(tmp_path):
    history = RunHistory()
    mixed = [1, 0.5, "unknown", True, None, float("nan")]
    for position in range(12_000):
        history.tables["channels"].add(layer="bn", channel=position, running_mean=position / 7)
    history.tables["alarms"].rows = [(cell, "bn", "shift", 1.0, "") for cell in mixed]
    log = offline_run(tmp_path, history)
    [item] = items(log)
    channels = json.loads(read_media(log, item, TABLE + "channels"))["data"]
    assert [row[2] for row in channels] == [position / 7 for position in range(12_000)]
    cells = [row[0] for row in json.loads(read_media(log, item, TABLE + "alarms"))["data"]]
    assert cells == [*mixed[:-1], None]
    assert [type(cell) for cell in cells[:4]] == [int, float, str, bool]


def test_defining_again_after_a_resume_changes_nothing(tmp_path, log):
    with offline_logger(tmp_path) as logger:
        define_metrics(logger.experiment, HOSTILE)
        define_metrics(logger.experiment, HOSTILE)
    assert definitions(log_file(tmp_path)) == definitions(log)
    configs = [record["update"]["bn_layers"] for record in records(log_file(tmp_path), "config")]
    assert configs[0] == configs[-1]


def test_another_models_names_replace_the_first_and_the_users_config_stays(tmp_path):
    with offline_logger(tmp_path) as logger:
        logger.log_hyperparams({"lr": 0.1, "model": {"name": "resnet"}})
        define_metrics(logger.experiment, ["a.bn", "b.bn"])
        define_metrics(logger.experiment, ["c.bn"])
        config = dict(logger.experiment.config)
    assert config == {"lr": 0.1, "model": {"name": "resnet"}, "bn_layers": {"c_bn": "c.bn"}}


def test_an_entry_of_the_users_own_is_left_as_it_is_and_that_is_said(tmp_path):
    with offline_logger(tmp_path) as logger:
        logger.log_hyperparams({"bn_layers": {"kind": "group"}})
        with pytest.warns(UserWarning, match="config has a 'bn_layers' of its own, which is left as it is.*Rename"):
            define_metrics(logger.experiment, ["bn1"])
        assert logger.experiment.config["bn_layers"] == {"kind": "group"}


@pytest.mark.parametrize("layers", [["bn1"], ["a.b", "a_b", ""], HOSTILE], ids=str)
def test_names_of_layers_are_told_from_an_entry_of_the_users_own(layers):
    assert are_names({short: layer for layer, short in short_names(layers).items()})
    for other in (12, None, layers, {"kind": "group"}, {"bn1": 3}):
        assert not are_names(other)


def test_the_loggers_prefix_is_part_of_every_name(tmp_path):
    history = history_of(["bn1"])
    log = offline_run(tmp_path, history, prefix="teacher")
    assert "teacher-bn/shift_worst" in definitions(log)
    assert definitions(log)["teacher-bn_shift/bn1"]["options"]["hidden"]
    logged = {key for item in items(log) for key in item if "bn" in key and not key.startswith("_")}
    assert all(key.startswith("teacher-bn") for key in logged)
    assert {key for key in logged if "._" not in key and "." not in key} <= definitions(log).keys()


def test_the_summary_keeps_the_worst_of_what_must_not_be_forgotten_and_the_last_of_the_rest(tmp_path):
    with offline_logger(tmp_path) as logger:
        define_metrics(logger.experiment, [])
        for step, value in enumerate((1.0, 3.0, 0.0)):
            logger.log_metrics({"bn/nonfinite_layers": value, "bn/shift_worst": value}, step=step)
    summary = {}
    for record in records(log_file(tmp_path), "summary"):
        summary |= record["update"]
    assert summary["bn/nonfinite_layers"] == {"max": 3}
    assert summary["bn/shift_worst"] == 0


def test_a_history_of_other_metrics_logs_nothing(tmp_path):
    history = RunHistory()
    history.log({"train/loss": 1.0}, 1)
    assert len(items(offline_run(tmp_path, history))) == len(rows(history)) == 1


def test_without_plotly_the_tables_are_logged_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bnkit.dashboard.page.figures", None)
    with pytest.warns(UserWarning, match=r"no heatmap of the layers: .*pip install plotly"):
        log = offline_run(tmp_path, history_of(["bn1"]))
    assert f"{TABLE}layers.path" in items(log)[-1]
    assert f"{HEATMAP}.path" not in items(log)[-1]


def test_the_rows_limit_of_wandb_is_as_it_was(tmp_path):
    import wandb

    before = wandb.Table.MAX_ROWS
    history = RunHistory()
    for position in range(before + 1):
        history.tables["channels"].add(layer="bn", channel=position)

    class Failing:
        def log(self, items):
            assert before + 1 == wandb.Table.MAX_ROWS
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_history(Failing(), history, 1)
    assert before == wandb.Table.MAX_ROWS


def test_who_does_not_log_to_wandb_does_not_import_it():
    modules = "bnkit.dashboard.wandb_run, bnkit.dashboard.sources, bnkit.dashboard.workspace"
    code = f"import sys, {modules}; print({{'wandb', 'lightning', 'plotly', 'wandb_workspaces'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "set()"
