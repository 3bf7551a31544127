"""What is read of a run is what was logged: bit for bit, from a real CSV logger and a real offline W&B run."""

from __future__ import annotations

import importlib.util
import math
import shutil

import pytest
from helpers.wandb_runs import HOSTILE, history_of, log_file, offline_logger, offline_run, rows
from lightning.pytorch.loggers import CSVLogger

from bnkit.dashboard.history import FILE_NAME, RunHistory
from bnkit.dashboard.sources import read
from bnkit.dashboard.wandb_run import define_metrics


@pytest.fixture(scope="module")
def history():
    return history_of(HOSTILE)


@pytest.fixture(scope="module")
def run(history, tmp_path_factory):
    """The directory of a W&B run."""
    folder = tmp_path_factory.mktemp("run")
    offline_run(folder, history)
    return folder


@pytest.fixture(scope="module")
def found(run):
    return read(run)


def csv_run(folder, history, prefix=""):
    logger = CSVLogger(folder, name="csv", version="", prefix=prefix)
    for step, metrics in rows(history).items():
        logger.log_metrics(metrics, step=step)
    logger.save()
    return folder / "csv" / "metrics.csv"


def test_a_wandb_run_is_read_bit_for_bit_with_its_tables_and_layers(found, history):
    assert found.metrics == history.metrics
    assert found.tables == history.tables
    assert found.names == history.names
    assert list(found.names) == list(history.names)  # in the model's order
    assert found.info["project"] == "bnkit"
    assert "state" not in found.info


def test_a_wandb_run_is_found_by_its_log_and_its_own_directory_too(run, found):
    log = log_file(run)
    assert read(log) == read(str(log.parent)) == found


def test_a_csv_is_read_bit_for_bit_with_the_names_of_its_keys(tmp_path, history):
    path = csv_run(tmp_path, history)
    found = read(path)
    assert found.metrics == history.metrics
    assert found == read(tmp_path)
    assert found.layers("bn_shift").keys() == history.names.keys()
    assert not any(table.rows for table in found.tables.values())


def test_what_bnkit_wrote_comes_before_the_csv_and_the_csv_before_wandb(tmp_path, run, history):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    csv_run(folder, history)
    assert read(folder).info["source"] == "CSV, metrics.csv"
    history.save(folder / "page")
    assert read(folder) == history
    RunHistory(info={"model": "another"}).save(folder)
    assert read(folder).info == {"model": "another"}
    assert read(folder / "page" / FILE_NAME) == history


def test_a_loggers_prefix_is_taken_off_and_said(tmp_path):
    prefix = "my-exp 1"
    history = history_of(["bn1", "bn2"])
    offline_run(tmp_path / "a", history, prefix=prefix)
    csv_run(tmp_path / "b", history, prefix=prefix)
    for folder in ("a", "b"):
        found = read(tmp_path / folder)
        assert found.metrics == history.metrics
        assert found.info["prefix"] == prefix
    assert read(tmp_path / "a").tables == history.tables


def test_two_hundred_layers(tmp_path):
    history = history_of([f"blocks.{number}.bn" for number in range(200)])
    offline_run(tmp_path, history)
    found = read(tmp_path)
    assert len(found.names) == 200
    assert found == RunHistory(history.metrics, history.tables, history.names, found.info)


def test_a_run_without_batchnorm_keys_brings_its_other_metrics(tmp_path):
    history = RunHistory()
    history.log({"train/loss": 1 / 3, "x-y/z": 2.0}, 5)
    offline_run(tmp_path, history)
    found = read(tmp_path)
    assert found.metrics == {"train/loss": [(5, 1 / 3)], "x-y/z": [(5, 2.0)]}
    assert found.names == {}
    assert found.layers("bn_shift") == {}


def test_what_is_not_finite_is_left_out_and_steps_are_in_order(tmp_path):
    values = {7: 1.0, 3: math.nan, 5: math.inf, 4: 2.0}
    logger = CSVLogger(tmp_path / "a", name="", version="")
    with offline_logger(tmp_path / "b") as wandb_logger:
        for step, value in values.items():
            logger.log_metrics({"bn/kl_worst": value}, step=step)
            wandb_logger.log_metrics({"bn/kl_worst": value}, step=step)
    logger.save()
    assert read(tmp_path / "a").metrics == read(tmp_path / "b").metrics == {"bn/kl_worst": [(4, 2.0), (7, 1.0)]}


def test_the_layers_of_a_run_that_did_not_end_are_in_a_natural_order_and_its_state_is_said(tmp_path):
    with offline_logger(tmp_path) as logger:
        define_metrics(logger.experiment, ["layer2.bn", "layer10.bn"])
        logger.log_metrics({"bn_shift/layer10_bn": 0.5}, step=1)
    log = log_file(tmp_path)
    whole = log.read_bytes()
    log.write_bytes(whole[: whole.rindex(b"layer10_bn") + 40])
    found = read(log)
    assert found.info["state"] == "not finished, or its log is not whole"
    assert list(found.names.values()) == ["layer2.bn", "layer10.bn"]


def test_a_table_whose_file_is_gone_is_said(tmp_path, run):
    shutil.copytree(run, tmp_path / "copy")
    [file] = (tmp_path / "copy").glob("wandb/offline-run-*/files/media/table/bn_table/alarms_*.table.json")
    file.unlink()
    found = read(tmp_path / "copy")
    assert found.info["table alarms"] == "not known, its file is gone"
    assert not found.tables["alarms"].rows
    assert found.tables["layers"].rows


def test_an_entry_of_the_users_own_in_the_config_names_no_layer(tmp_path):
    with offline_logger(tmp_path) as logger:
        logger.log_hyperparams({"bn_layers": {"kind": "group"}})
        logger.log_metrics({"bn_shift/bn1": 1.0}, step=1)
    assert read(tmp_path).names == {}


def test_a_line_cut_off_by_a_crash_keeps_what_it_has(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,bn/alarms,note\n0,1,2.0,fine\n0,2")
    assert read(tmp_path).metrics == {"epoch": [(1, 0.0), (2, 0.0)], "bn/alarms": [(1, 2.0)]}


def test_several_runs_are_not_mixed_and_not_chosen_from(tmp_path):
    for version in ("version_0", "version_1"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text("step,a\n1,2\n")
    with pytest.raises(ValueError, match=r"has 2 runs in it, give the path of one: version_0/metrics.csv, version_1/"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", "epoch,loss\n0,1\n", "no column 'step': give the metrics.csv of Lightning's CSVLogger"),
        ("metrics.csv", "step,loss\n1,2\nx,1\n", "line 3: the step is not a number; mend or delete"),
        ("bn_history.json", '{"a": 1}', "is not a bn_history.json that bnkit wrote"),
        ("bn_history.json", "[1", "is not a bn_history.json that bnkit wrote"),
        ("run.wandb", "garbage", r"W&B cannot read .*run.wandb \(.*; give a whole .wandb file"),
        ("log.txt", "", "is not a log that is read here: give a bn_history.json, a metrics.csv, or a .wandb file"),
        ("events.out.tfevents.1.host", "", r"is a TensorBoard log, which is not read here: log with a CSVLogger"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_directory_with_nothing_to_read_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no run in it: looked.* bn_history.json, metrics.csv .* and \*.wandb .*log"):
        read(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host").touch()
    with pytest.raises(ValueError, match="is a TensorBoard log"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the directory of a run"):
        read(tmp_path / "nowhere")


def test_without_wandb_a_wandb_run_says_what_to_install_and_a_csv_is_read(tmp_path, run, history, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="W&B is not installed: pip install wandb"):
        read(run)
    assert read(csv_run(tmp_path, history)).metrics == history.metrics
