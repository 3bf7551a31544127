"""A snapshot as scalars and rows: what is not known is left out, and never 0."""

import pytest
import torch
from torch import nn

import bnkit
from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, short_names
from bnkit.dashboard.scalars import (
    add_recalibration,
    dropout_scalars,
    kind,
    layer_table,
    recalibration_scalars,
    snapshot_scalars,
)
from bnkit.layers import batch_norm_layers
from bnkit.monitoring.snapshot import LayerMeasures, Snapshot
from bnkit.norms import Ghost

LAYERS = {"a.bn": nn.BatchNorm1d(2), "b.bn": nn.BatchNorm1d(6), "c.bn": nn.BatchNorm1d(4)}
NAMES = short_names(LAYERS)


def _scalars(*measures, alarms=0):
    return snapshot_scalars(Snapshot(1, dict(zip(LAYERS, measures, strict=True)), ()), LAYERS, NAMES, alarms)


def test_the_model_has_the_median_and_the_worst_of_the_known_layers():
    scalars = _scalars(
        LayerMeasures("layer", mean_shift=1.0, dead_fraction=1.0, finite=True),
        LayerMeasures("layer", mean_shift=3.0, dead_fraction=0.5, finite=False),
        LayerMeasures("unknown: it is frozen"),
        alarms=4,
    )
    assert scalars["bn/shift_median"] == 2.0
    assert scalars["bn/shift_worst"] == 3.0
    assert scalars["bn/dead_fraction"] == (2 + 3) / 8  # of the channels that are known
    assert scalars["bn/nonfinite_layers"] == 1
    assert scalars["bn/unknown_layers"] == 1
    assert scalars["bn/alarms"] == 4
    assert {key for key in scalars if key.startswith("bn_")} == {"bn_shift/a_bn", "bn_shift/b_bn"}


def test_where_nothing_is_known_that_alone_is_said():
    assert _scalars(*[LayerMeasures("unknown: it is frozen")] * 3) == {"bn/alarms": 0, "bn/unknown_layers": 3}


def test_all_keys_are_in_the_list():
    known = dict.fromkeys(LayerMeasures._fields, 0.5) | {"source": "layer", "finite": True}
    keys = set(_scalars(*[LayerMeasures(**known)] * 3)) | set(dropout_scalars({"a.bn": -1.0}, NAMES))
    assert {key for key in keys if key.startswith("bn/")} <= {key.key for key in MODEL_KEYS}
    assert {key.split("/")[0] for key in keys} - {"bn"} <= {key.prefix for key in LAYER_KEYS}


def test_the_worst_dropout_shift_is_that_of_the_largest_magnitude():
    assert dropout_scalars({"a.bn": -1.0, "b.bn": 0.5}, NAMES) == {
        "bn/dropout_shift_worst": 1.0,
        "bn_dropout/a_bn": -1.0,
        "bn_dropout/b_bn": 0.5,
    }
    assert dropout_scalars({}, NAMES) == {}


def test_a_recalibration_is_in_the_tables_channel_by_channel():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = [layer.running_mean.clone() for layer in (model[0], model[2])]
    report = bnkit.recalibrate(model, list(torch.randn(4, 16, 3) * 2 + 1))
    layers = batch_norm_layers(model)
    found = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers.values()]
    for layer in layers.values():  # as weight averaging does, which puts the trained model back
        layer.reset_running_stats()
    history = RunHistory()
    add_recalibration(history, report, layers, step=5)
    channels = history.tables["channels"].records()
    assert [(row["layer"], row["channel"]) for row in channels] == [("0", 0), ("0", 1), ("0", 2), ("2", 0), ("2", 1)]
    for column, values in (
        ("running_mean", torch.cat(before)),
        ("population_mean", torch.cat([mean for mean, _ in found])),
        ("population_var", torch.cat([var for _, var in found])),
    ):
        assert [row[column] for row in channels] == pytest.approx(values.tolist(), rel=1e-5)
    rows = history.tables["recalibrations"].records()
    assert [row["mean_shift"] for row in rows] == [layer.shift for layer in report.layers.values()]
    errors = report.layers["0"].standard_error / (1 + model[0].eps) ** 0.5
    assert rows[0]["standard_error"] == pytest.approx(float(errors.square().mean().sqrt()))
    assert recalibration_scalars(report, {"0": "0", "2": "2"})["bn_estimation/0"] == report.layers["0"].shift


def test_of_many_channels_evenly_spaced_ones_are_kept_and_of_recalibrations_the_last():
    model = nn.Sequential(nn.BatchNorm1d(10_000))
    report = bnkit.recalibrate(model, [torch.randn(4, 10_000) for _ in range(2)])
    history = RunHistory()
    for step in range(3):
        add_recalibration(history, report, batch_norm_layers(model), step)
    channels = [row["channel"] for row in history.tables["channels"].records()]
    assert channels == list(range(0, 10_000, 3))
    assert len(history.tables["recalibrations"].rows) == 3


def test_the_table_of_layers_says_what_each_is_and_leaves_out_what_is_not_known():
    layers = {"one": nn.BatchNorm2d(3), "two": nn.BatchNorm2d(4)}
    Ghost(2).apply(layers["two"])
    snapshot = Snapshot(3, {"one": LayerMeasures("layer", kl=0.5), "two": LayerMeasures("unknown: no idea")}, ())
    table = layer_table(snapshot, layers, estimation_shift={"one": 0.25}, dropout_shift={}, alarms=["two", "two"])
    one, two = table.records()
    assert (one["kind"], one["channels"], one["kl"], one["estimation_shift"], one["alarms"]) == (
        "BatchNorm2d",
        3,
        0.5,
        0.25,
        0,
    )
    assert (two["kind"], two["source"], two["kl"], two["alarms"]) == (kind(layers["two"]), "unknown: no idea", None, 2)
