"""One alarm for one cause, in one sentence, and none again while it lasts."""

import pytest

from bnkit.monitoring.alarms import AlarmBell

STEPS = {position: 1000 + position for position in range(3000)}
LAYERS = ["first", "second", "third"]


def _bell(silence=100):
    return AlarmBell(LAYERS, silence)


def test_what_begins_together_is_one_alarm_at_the_first_layer():
    bell = _bell()
    bell.shift({"third": (12, 9.0), "second": (13, 2.0), "first": (17, 1.5)}, STEPS, 20)
    (alarm,) = bell.alarms
    assert (alarm.step, alarm.layer, alarm.code, alarm.score) == (1012, "first", "shift", 1.5)
    assert "'first'" in alarm.message
    assert "2 other layers" in alarm.message


def test_what_begins_apart_are_two_alarms():
    bell = _bell()
    bell.shift({"first": (2, 1.5), "second": (30, 2.0)}, STEPS, 40)
    assert [(alarm.layer, alarm.step) for alarm in bell.alarms] == [("first", 1002), ("second", 1030)]


def test_a_layer_that_follows_in_the_next_look_is_no_second_alarm():
    bell = _bell()
    bell.shift({"first": (49, 3.0)}, STEPS, 49)
    bell.shift({"second": (51, 3.0), "third": (54, 3.0)}, STEPS, 99)
    assert [alarm.layer for alarm in bell.alarms] == ["first"]
    bell.shift({"third": (240, 3.0)}, STEPS, 249)
    assert [alarm.layer for alarm in bell.alarms] == ["first", "third"]


def _ring(bell, code, found, now):
    step = STEPS[now]
    match code:
        case "dead":
            bell.dead(dict.fromkeys(found, (0.95, 1.0, -9.0)), step, now)
        case "stale":
            bell.stale(dict.fromkeys(found, (2.0, 0.5, 0.1)), step, now)
        case "nonfinite":
            bell.nonfinite(dict.fromkeys(found, now), STEPS, now)
        case "dropout":
            bell.dropout(dict.fromkeys(found, 1.5), lambda name: " ('drop', p=0.5, comes before it)", step, now)


@pytest.mark.parametrize("every", [10, 500])  # looks may be further apart than the silence is long
@pytest.mark.parametrize("code", ["dead", "stale", "nonfinite", "dropout"])
def test_a_state_that_lasts_is_told_once_and_again_when_it_comes_back(code, every):
    bell = _bell(silence=100)
    for look in range(3):
        _ring(bell, code, ["second"], look * every)
    assert [(alarm.layer, alarm.code, alarm.step) for alarm in bell.alarms] == [("second", code, 1000)]
    for look in range(3, 5):
        _ring(bell, code, [], look * every)
    _ring(bell, code, ["second"], 4 * every + 200)
    assert len(bell.alarms) == 2


@pytest.mark.parametrize("code", ["dead", "stale", "nonfinite", "dropout"])
def test_a_sentence_names_layer_and_cure(code):
    bell = _bell()
    _ring(bell, code, ["second"], 3)
    (alarm,) = bell.alarms
    assert alarm.score >= 1
    assert "'second'" in alarm.message
    assert alarm.message.count(". ") == 0, "one sentence"
    assert alarm.message.endswith(".")
    cure = {"dead": "learning rate", "stale": "recalibrate", "nonfinite": "clip", "dropout": "put dropout after"}[code]
    assert cure in alarm.message


def test_kinds_do_not_silence_each_other():
    bell = _bell()
    for code in ("dead", "stale", "nonfinite", "dropout"):
        _ring(bell, code, ["second"], 3)
    assert len(bell.alarms) == 4


def test_a_restored_bell_is_silent_about_what_it_has_told():
    bell, other = _bell(), _bell()
    bell.shift({"first": (49, 3.0)}, STEPS, 49)
    _ring(bell, "dead", ["second"], 49)
    other.restore(bell.state())
    assert other.alarms == bell.alarms
    other.shift({"first": (55, 3.0), "third": (52, 2.0)}, STEPS, 99)
    _ring(other, "dead", ["second"], 99)
    assert len(other.alarms) == 2
