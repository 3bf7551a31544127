"""ActivationShiftMonitor: a fault that is planted in a fit is found, and the right layer is named."""

import logging

import pytest
import torch
from helpers.lightning_models import Classifier, Images, trainer
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from bnkit.callbacks import ActivationShiftMonitor
from bnkit.dashboard.history import RunHistory

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*no `val_dataloader`", "ignore:.*isinstance.treespec, LeafSpec."
)

STEPS = 120


class Quiet(Classifier):
    """Learns slowly, so that nothing moves by itself."""

    def __init__(self, **options):
        super().__init__(**({"lr": 1e-4} | options))


def _fit(folder, model, **options):
    seed_everything(7, verbose=False)
    monitor = ActivationShiftMonitor(every_n_steps=10, report_dir=folder, window=30, **options)
    engine = trainer(folder, [monitor], max_epochs=-1, max_steps=STEPS)
    engine.fit(model(), DataLoader(Images(64), batch_size=16, shuffle=True))
    return monitor, RunHistory.load(folder / "bn_history.json")


def _alarms(history):
    return [(row["code"], row["layer"]) for row in history.tables["alarms"].records()]


def test_a_quiet_training_raises_no_alarm(tmp_path, capsys, caplog):
    monitor, history = _fit(tmp_path, Quiet)
    assert monitor.monitor.alarms == []
    assert _alarms(history) == []
    assert history.metrics["bn/alarms"][-1] == (STEPS, 0) or history.metrics["bn/alarms"][-1] == (STEPS - 1, 0)
    assert "0 alarms." in capsys.readouterr().out
    assert not [r for r in caplog.records if r.name.startswith("bnkit")]


def test_inputs_that_change_are_found_at_their_step_in_the_first_layer(tmp_path, capsys, caplog):
    class Changes(Quiet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x * 3 + 2 if self.trainer.global_step >= 80 else x), y

    with caplog.at_level(logging.WARNING, logger="bnkit"):
        _, history = _fit(tmp_path, Changes)
    [*_, first] = reversed(history.tables["alarms"].records())
    assert (first["code"], first["layer"]) == ("shift", "net.bn1")
    assert 80 <= first["step"] <= 82
    assert history.metrics["bn/alarms"][-1][1] == len(_alarms(history))
    assert f"- step {first['step']}: {first['message']}" in capsys.readouterr().out
    assert next(record.getMessage() for record in caplog.records if record.name.startswith("bnkit")) == first["message"]
    layers = {row["layer"]: row["alarms"] for row in history.tables["layers"].records()}
    assert layers["net.bn1"] >= 1


def test_a_layer_that_is_frozen_while_training_goes_on_is_found_to_be_stale(tmp_path):
    class FrozenTooEarly(Classifier):
        def __init__(self):
            super().__init__(lr=0.01)

        def on_train_epoch_start(self):
            self.net.bn2.eval()

    _, history = _fit(tmp_path, FrozenTooEarly, input_every_n_steps=5)
    assert ("stale", "net.bn2") in _alarms(history)
    assert history.metrics["bn_shift/net_bn2"]


def test_a_dead_layer_is_found(tmp_path):
    class Dead(Quiet):
        def on_train_start(self):
            torch.nn.init.zeros_(self.net.bn2.weight)
            torch.nn.init.constant_(self.net.bn2.bias, -1.0)

    _, history = _fit(tmp_path, Dead)
    assert _alarms(history) == [("dead", "net.bn2")]
    assert history.metrics["bn/dead_fraction"][-1][1] == 0.5


def test_dropout_before_a_layer_is_found_by_the_gap_probe(tmp_path):
    _, history = _fit(tmp_path, lambda: Quiet(dropout=0.5), gap_every_n_steps=20)
    assert _alarms(history) == [("dropout", "net.bn2")]
    assert history.metrics["bn_dropout/net_bn1"][-1][1] == pytest.approx(0, abs=1e-4)
    assert history.metrics["bn_dropout/net_bn2"][-1][1] > 0.1
    assert history.metrics["bn/dropout_shift_worst"][-1][1] == abs(history.metrics["bn_dropout/net_bn2"][-1][1])


def test_a_nan_is_found_at_its_step_and_unknown_numbers_are_left_out(tmp_path, capsys):
    class Poisoned(Quiet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x * float("nan") if self.trainer.global_step == 63 else x), y

    _, history = _fit(tmp_path, Poisoned)
    [row] = history.tables["alarms"].records()
    assert (row["code"], row["layer"], row["step"]) == ("nonfinite", "net.bn1", 63)
    assert history.metrics["bn/nonfinite_layers"][-1][1] == 2
    assert history.metrics["bn_shift/net_bn1"][-1][0] < 70  # not known from then on
    out = capsys.readouterr().out
    assert "The activation shift of no BatchNorm layer is known, of 2." in out
    assert "net.bn1, its batch statistics were not finite; and 1 other layer." in out
    assert "1 alarm." in out
