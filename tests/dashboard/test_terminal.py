"""What the terminal says at the end of a run."""

from bnkit.dashboard.terminal import worst_layers
from bnkit.monitoring.alarms import Alarm
from bnkit.monitoring.snapshot import LayerMeasures, Snapshot


def _text(layers, alarms=()):
    return worst_layers(Snapshot(7, layers, ()), alarms).splitlines()


def test_the_worst_five_layers_come_first_and_unknown_numbers_are_said():
    layers = {f"bn{i}": LayerMeasures("layer", mean_shift=i / 10, dead_fraction=0.25) for i in range(7)}
    lines = _text(layers)
    assert lines[0].startswith("Activation shift of the 5 worst of 7 BatchNorm layers")
    assert [line.split()[0] for line in lines[3:8]] == ["bn6", "bn5", "bn4", "bn3", "bn2"]
    assert lines[3].split() == ["bn6", "0.6", "unknown", "unknown", "25%"]
    assert lines[-1] == "0 alarms."


def test_layers_that_are_not_known_are_named_with_the_reason():
    layers = {
        "one": LayerMeasures("layer", mean_shift=1.0),
        "two": LayerMeasures("unknown: its momentum is 0"),
        "three": LayerMeasures("unknown: its momentum is 0"),
    }
    assert _text(layers)[-2] == "Not known: two, its momentum is 0; and 1 other layer."


def test_where_no_layer_is_known_there_is_no_table():
    lines = _text({"one": LayerMeasures("layer", finite=False)}, [Alarm(3, "one", "nonfinite", 1.0, "It is NaN.")])
    assert lines == [
        "The activation shift of no BatchNorm layer is known, of 1.",
        "",
        "Not known: one, its batch statistics were not finite.",
        "1 alarm.",
        "- step 3: It is NaN.",
    ]
