"""The verdict says what was found and what to do; what is not known, it says is not known."""

import pytest
from helpers.histories import history, metrics_only

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page.sections import sections
from bnkit.dashboard.page.tiles import tiles
from bnkit.dashboard.page.verdict import judge
from bnkit.dashboard.page.wording import number


def test_the_verdict_names_the_layer_of_the_strongest_alarm_and_what_to_do():
    run = history(points=30)
    run.tables["alarms"].add(step=500, layer="the.worst", code="shift", score=9.0, message="the.worst: lower it.")
    first = judge(run).first
    assert (first.level, first.layer, first.cure) == ("alarm", "the.worst", "the.worst: lower it.")
    assert first.text.startswith("3 alarms between steps 220 and 500")


def test_a_run_without_alarms_is_calm_and_one_without_a_monitor_is_not_known():
    run = RunHistory()
    run.log({"bn/alarms": 0.0}, 10)
    assert judge(run).first.level == "calm"
    assert judge(RunHistory()).first.level == "unknown"
    assert judge(metrics_only()).first.text == "2 alarms; this log does not say in which layers."


def test_nan_in_a_layer_comes_before_everything_else():
    run = history(points=30)
    run.tables["layers"].add(layer="broken", finite=False, source="layer")
    assert judge(run).first.layer == "broken"
    assert "1 layer" in judge(run).first.text


def test_what_is_not_known_is_never_shown_as_zero():
    assert {tile.text for tile in tiles(RunHistory())} == {"unknown"}
    assert number(None) == number(float("nan")) == "unknown"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.99999, "1"), (1234567.0, "1,234,567"), (999.7, "1,000"), (-1e-7, "\u22121\u00d710⁻⁷"), (7, "7")],
)
def test_numbers_have_three_digits_and_no_needless_exponent(value, text):
    assert number(value) == text


def test_every_section_without_numbers_says_what_is_missing():
    assert all(section.missing for section in sections(RunHistory()))
    assert any("BatchNormRecalibration" in text for section in sections(metrics_only()) for text in section.missing)


def test_what_was_zero_throughout_is_said_and_not_drawn():
    where = next(section for section in sections(history()) if section.identifier == "where")
    assert "Zero throughout: Layers with NaN or Inf." in where.missing
    assert "bn-nonfinite_layers" not in {drawing.identifier for drawing in where.drawings}
