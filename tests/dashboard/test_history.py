"""What is kept of a run comes back as it was, under names that every dashboard can show."""

import json
import math
import subprocess
import sys

import pytest
from helpers.histories import history, layer_names, metrics_only
from hypothesis import given
from hypothesis import strategies as st

from bnkit.dashboard.history import FILE_NAME, TABLES, RunHistory, Table
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, per_layer, short_names

names = st.lists(st.text(max_size=12), unique=True, max_size=30)
finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("run", [history(), metrics_only(), RunHistory()], ids=["whole", "metrics only", "empty"])
def test_a_history_is_read_as_it_was_saved(run, tmp_path):
    path = run.save(tmp_path / "new" / "folder")
    assert path.name == FILE_NAME
    assert RunHistory.load(path) == run
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME], "nothing is left beside it"


@given(st.dictionaries(st.text(), st.lists(st.tuples(st.integers(0, 2**53), finite))))
def test_every_number_survives_json(metrics):
    run = RunHistory(metrics=metrics)
    assert RunHistory.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False))) == run


def test_what_is_not_finite_is_left_out_of_the_metrics_and_unknown_in_a_table():
    run = RunHistory()
    run.log({"a": math.nan, "b": math.inf, "c": 1.0}, step=3)
    assert run.metrics == {"c": [(3, 1.0)]}
    run.tables["alarms"].add(step=1, layer="a", score=math.nan)
    assert run.tables["alarms"].records() == [{"step": 1, "layer": "a", "code": None, "score": None, "message": None}]


def test_a_table_refuses_a_column_that_it_does_not_have():
    with pytest.raises(KeyError, match="no columns"):
        Table(("a",)).add(b=1)


def test_two_histories_share_no_table():
    RunHistory().tables["alarms"].add(step=1)
    assert all(not table.rows for table in RunHistory().tables.values())
    assert list(RunHistory().tables) == list(TABLES)


def test_layers_come_in_the_models_order_by_their_own_names():
    run = RunHistory(names={"b": "the.b", "a": "the.a"})
    run.log({"bn_shift/a": 1.0, "bn_shift/new": 2.0, "bn_shift/b": 3.0, "bn_shift_other/a": 4.0}, step=0)
    assert list(run.layers("bn_shift")) == ["the.b", "the.a", "new"]
    assert run.layers("bn_shift")["the.a"] == [(0, 1.0)]
    assert run.layers("bn_kl") == {}


@given(names)
def test_short_names_differ_and_have_neither_dots_nor_slashes(layers):
    shorts = short_names(layers)
    assert list(shorts) == layers
    assert len(set(shorts.values())) == len(layers)
    assert all(short and not set(short) & set("./ ") for short in shorts.values())


@given(st.integers(1, 40), st.integers(1, 10), st.data())
def test_above_the_limit_the_layers_of_largest_magnitude_are_logged(layers, worst, data):
    values = {f"l{i}": data.draw(st.floats(-9, 9)) for i in range(layers)}
    kept = per_layer("bn_shift", values, short_names(values), limit=20, worst=worst)
    assert len(kept) == (layers if layers <= 20 else worst)
    left_out = [abs(value) for layer, value in values.items() if f"bn_shift/{layer}" not in kept]
    assert not left_out or max(left_out) <= min(abs(value) for value in kept.values())


def test_each_key_is_there_once_with_one_slash():
    keys = [key.key for key in MODEL_KEYS] + [f"{key.prefix}/layer" for key in LAYER_KEYS]
    assert len(set(keys)) == len(keys)
    assert all(key.count("/") == 1 and "." not in key for key in keys)


def test_the_made_up_runs_have_different_layers():
    assert len(set(layer_names(200))) == 200


def test_names_and_histories_need_neither_plotly_nor_lightning():
    code = (
        "import sys, bnkit.dashboard.keys, bnkit.dashboard.history\n"
        "print([name for name in ('plotly', 'lightning', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
