"""Each figure shows the numbers of the log, all that matter and no others."""

import copy
import math
from itertools import pairwise

import pytest
from helpers.histories import NASTY, history, metrics_only
from hypothesis import given
from hypothesis import strategies as st

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page import figures
from bnkit.dashboard.page.frame import decade_marks, label
from bnkit.dashboard.page.grid import MAX_COLUMNS, Grid, largest, ticks
from bnkit.dashboard.page.traces import step_axis

RUN = history(layers=20, points=30)
ALL = {
    "heatmap": figures.heatmap,
    "worst_layers": figures.worst_layers,
    "lines": lambda run: figures.lines(run, {"train/loss": "train", "val/loss": "val"}),
    "noise": figures.noise,
    "recalibration": figures.recalibration,
    "channels": lambda run: figures.channels(run, "layer1.1.bn2"),
}


def one_layer(*values):
    run = RunHistory()
    for step, value in enumerate(values):
        run.log({"bn_shift/a": value}, step)
    return run


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_a_function_of_the_history_alone(name):
    before = copy.deepcopy(RUN)
    figure = ALL[name](RUN)
    assert figure.data
    assert figure.to_json() == ALL[name](RUN).to_json()
    assert before == RUN, "the history is left as it was"


@pytest.mark.parametrize("name", ALL)
def test_a_figure_of_a_run_without_its_numbers_has_no_trace(name):
    assert not ALL[name](RunHistory()).data


def test_the_heatmap_has_every_logged_value_with_its_layer_and_step():
    [trace] = figures.heatmap(RUN).data
    shown = {
        (name, step): value
        for name, row, labels in zip(RUN.names.values(), trace.customdata, trace.text, strict=True)
        for step, value, text in zip(trace.x, row, labels, strict=True)
        if text == label(name)
    }
    logged = {(name, step): value for name, series in RUN.layers("bn_shift").items() for step, value in series}
    assert shown == logged


def test_the_heatmaps_first_layer_is_on_top():
    top, *_, bottom = figures.heatmap(RUN).layout.yaxis.ticktext
    assert (top, bottom) == ("layer1.0.bn1", "layer4.19.bn2")
    low, high = figures.heatmap(RUN).layout.yaxis.range
    assert low > high, "the axis goes down"


def test_colours_are_logarithmic_where_values_span_decades():
    [trace] = figures.heatmap(one_layer(0.001, 0.1, 10.0, 0.0)).data
    assert list(trace.z[0]) == pytest.approx([-3, -1, 1, -3])
    assert list(trace.customdata[0]) == [0.001, 0.1, 10.0, 0.0], "the numbers themselves are untouched"
    assert set(trace.colorbar.ticktext) >= {"0.001", "0.1", "10"}


def test_colours_go_both_ways_from_zero_where_values_are_negative():
    [trace] = figures.heatmap(one_layer(-2.0, 1.0)).data
    assert (trace.zmin, trace.zmax) == (-2.0, 2.0)


@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0,), (1e-300, 1e300), (5e-324,)])
def test_a_heatmap_of_odd_values_is_finite(values):
    [trace] = figures.heatmap(one_layer(*values)).data
    assert all(math.isfinite(value) for value in [*trace.z[0], trace.zmin, trace.zmax])


def test_blank_is_what_was_not_logged():
    run = RunHistory()
    run.log({"bn_shift/a": 1.0}, 0)
    run.log({"bn_shift/b": 2.0}, 1)
    assert [list(row) for row in figures.heatmap(run).data[0].customdata] == [[1.0, None], [None, 2.0]]


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.dictionaries(st.integers(0, 60), st.floats(-9, 9), min_size=1), min_size=1
    ),
    st.integers(1, 70),
)
def test_a_grid_keeps_the_largest_of_what_it_puts_together(values, columns):
    layers = {layer: sorted(points.items()) for layer, points in values.items()}
    grid = Grid.of(layers, columns)
    assert len(grid.steps) <= columns
    assert grid.steps == sorted(set(grid.steps))
    for layer, points in layers.items():
        known = [abs(value) for value in grid.rows[layer] if value is not None]
        assert max(known) == max(abs(value) for _, value in points)
        assert {value for value in grid.rows[layer] if value is not None} <= {value for _, value in points}


def test_a_long_run_has_a_bounded_number_of_columns():
    run = one_layer(*(1.0 + step % 7 for step in range(5 * MAX_COLUMNS)))
    assert len(figures.heatmap(run).data[0].x) == MAX_COLUMNS


@given(st.integers(1, 200), st.integers(1, 9), st.data())
def test_labels_keep_their_distance_and_the_worst_layer_has_one(layers, apart, data):
    names = [f"l{i}" for i in range(layers)]
    worst = data.draw(st.sampled_from(names))
    chosen = ticks(names, [worst], apart)
    assert names.index(worst) in chosen
    assert all(b - a >= apart for a, b in pairwise(chosen))


def test_the_worst_layers_are_drawn_worst_first_with_the_median_and_the_alarms():
    figure = figures.worst_layers(RUN, number=3)
    assert [trace.name for trace in figure.data if trace.name] == [
        *(label(name) for name in largest(RUN.layers("bn_shift"), 3)),
        "median of all layers",
        "alarm",
    ]
    assert figure.data[0].name == "layer4.18.bn1"
    assert sorted(figure.data[-1].x) == sorted(row["step"] for row in RUN.tables["alarms"].records())
    assert "Look at the data and the learning rate" in figure.data[-1].text[0].replace("<br>", " ")


def test_lines_differ_in_their_dashes_and_not_in_colour_alone():
    dashes = [trace.line.dash for trace in figures.worst_layers(RUN, number=8).data[:8]]
    assert len(set(dashes)) == 8


def test_channels_lie_on_the_line_where_the_running_statistics_are_right():
    run = RunHistory()
    for channel, (mean, var) in enumerate([(1.0, 4.0), (-2.0, 0.25)]):
        run.tables["channels"].add(
            layer="a", channel=channel, running_mean=mean, running_var=var, population_mean=mean, population_var=var
        )
    means, stds, *_ = figures.channels(run, "a").data
    assert means.x == means.y == pytest.approx((0.5, -4.0), rel=1e-4)
    assert stds.x == stds.y == pytest.approx((2.0, 0.5), rel=1e-4)


def test_a_channel_with_an_unknown_statistic_is_not_drawn_as_zero():
    run = history(layers=20, points=10, channels=4)
    run.tables["channels"].add(layer="layer1.1.bn2", channel=4, running_mean=1.0, running_var=1.0)
    assert len(figures.channels(run, "layer1.1.bn2").data[0].x) == 4


def test_an_unknown_noise_is_not_drawn_as_zero():
    noise, size = figures.noise(RUN).data
    assert len(noise.x) == len(size.x) == 19, "the twentieth layer is not known"
    assert min(noise.x) > 0


@pytest.mark.parametrize("name", NASTY)
def test_a_layers_name_is_no_markup_to_plotly(name):
    assert "<" not in label(name)
    assert name in figures.heatmap(RUN).data[0].text[list(RUN.names.values()).index(name)][0].replace(
        "&lt;", "<"
    ).replace("&gt;", ">").replace("&amp;", "&")


def test_a_log_without_tables_still_has_its_figures():
    run = metrics_only()
    assert figures.heatmap(run).data
    assert figures.worst_layers(run).data
    assert not figures.noise(run).data


@given(st.floats(1e-12, 1e12), st.floats(1.5, 1e12))
def test_a_logarithmic_scale_has_some_marks_and_not_many(low, times):
    marks = decade_marks(low, low * times)
    assert all(low <= mark <= low * times for mark in marks)
    assert len(marks) <= 9
    assert len(marks) >= (1 if times > 3.5 else 0)


@pytest.mark.parametrize(("steps", "expected"), [([7, 7], {"tickvals": [7]}), ([3, 6], {"dtick": 1}), ([0, 900], {})])
def test_the_steps_on_an_axis_are_whole_numbers(steps, expected):
    axis = step_axis(steps)
    assert {key: axis[key] for key in ("tickvals", "dtick") if key in axis} == expected
