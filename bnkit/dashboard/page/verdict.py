"""The verdict: what a run's numbers mean and what to do, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal

from bnkit.dashboard.history import Cell, RunHistory
from bnkit.dashboard.page.wording import count, number, percent

__all__ = ["Level", "Point", "Verdict", "alarms", "judge", "last", "last_recalibration", "typical"]

Level = Literal["alarm", "attention", "calm", "unknown"]
_ORDER: tuple[Level, ...] = ("alarm", "attention", "unknown", "calm")

# Rules of thumb of the page alone; the alarms are raised by the monitor, against each layer's own spread.
_ESTIMATION = 0.1  # running std by which a running mean may be off
_DISAGREEMENT = 0.02  # of the predictions that may differ between running and batch statistics
_NOISE = 0.1  # std by which a batch's mean may scatter
_DEAD = 0.1  # of the channels that may carry nothing on
_OVERHEAD = 0.05  # of the time that the monitor may take


@dataclass(frozen=True)
class Point:
    """One thing that was found, and what to do about it.

    Attributes:
        level: how grave it is.
        text: what was found.
        layer: where; empty where it is not one layer.
        cure: what to do; empty where nothing is to be done.
    """

    level: Level
    text: str
    layer: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        first: the gravest of what was found; that there is nothing, where there is nothing.
        others: the rest, the graver first.
    """

    first: Point
    others: list[Point]


def judge(history: RunHistory) -> Verdict:
    """Say what the numbers of a run mean; what is not known is said to be so."""
    points = sorted(_points(history), key=lambda point: _ORDER.index(point.level))
    if not points or (points[0].level == "unknown" and alarms(history) is not None):
        points.insert(0, Point("calm", "No alarms, and nothing that asks for a change."))
    return Verdict(points[0], points[1:])


def alarms(history: RunHistory) -> int | None:
    """How many alarms were raised; None where the run did not watch for them."""
    rows = history.tables["alarms"].rows
    counted = history.metrics.get("bn/alarms")
    if rows:
        return len(rows)
    if counted:
        return round(counted[-1][1])
    return 0 if history.tables["layers"].rows else None


def _points(history: RunHistory) -> Iterator[Point]:
    layers = history.tables["layers"].records()
    yield from _not_finite(history)
    yield from _alarms(history)
    yield from _estimation(history)
    gap = last(history, "bn/gap_disagreement")
    if gap and gap[1] > _DISAGREEMENT:
        yield Point(
            "attention",
            f"With running instead of batch statistics, {percent(gap[1])} of the predictions change (step {gap[0]:,}).",
            cure="Recalibrate and compare again. What remains is the batches' noise: normalize over more samples.",
        )
    noise = last(history, "bn/batch_noise")
    if noise and noise[1] > _NOISE:
        size = last(history, "bn/normalization_batch_size")
        needed = f" About {number(round(size[1]))} samples in one batch would bring it to 10 %." if size else ""
        yield Point(
            "attention",
            f"In the median layer, the mean of a batch scatters by {percent(noise[1])} of a std.{needed}",
            cure="Use a larger batch per device, or swap to Sync, which normalizes over all devices.",
        )
    dead = [row for row in layers if isinstance(row["dead_fraction"], float) and row["dead_fraction"] > _DEAD]
    if dead:
        first = max(dead, key=lambda row: float(row["dead_fraction"] or 0))
        yield Point(
            "attention",
            f"In {count(len(dead), 'layer')}, more than {percent(_DEAD)} of the channels carry nothing on; "
            f"most where {percent(_real(first['dead_fraction']))} do not:",
            layer=str(first["layer"]),
            cure="Lower the learning rate or the weight decay on γ, or make the layer narrower.",  # noqa: RUF001
        )
    unknown = [row for row in layers if str(row["source"] or "").startswith("unknown")]
    if unknown:
        yield Point(
            "unknown",
            f"Nothing is known of {count(len(unknown), 'layer')}"
            + (", of which the first is:" if len(unknown) > 1 else ":"),
            layer=str(unknown[0]["layer"]),
            cure=str(unknown[0]["source"]).removeprefix("unknown").lstrip(": "),
        )
    overhead = typical(history, "bn/monitor_overhead")
    if overhead is not None and overhead > _OVERHEAD:
        yield Point(
            "attention",
            f"The monitor took {percent(overhead)} of the time of a step, in the median.",
            cure="Let it look less often.",
        )


def _not_finite(history: RunHistory) -> Iterator[Point]:
    layers = [str(row["layer"]) for row in history.tables["layers"].records() if row["finite"] is False]
    counted = last(history, "bn/nonfinite_layers")
    if layers or (counted and counted[1] > 0):
        how_many = len(layers) or round(counted[1]) if counted else len(layers)
        yield Point(
            "alarm",
            f"NaN or Inf in the batch statistics of {count(how_many, 'layer')}"
            + (", the first in the model's order:" if layers else "."),
            layer=layers[0] if layers else "",
            cure="Stop the run: lower the learning rate or clip the gradients, and look for NaN in the data.",
        )


def _alarms(history: RunHistory) -> Iterator[Point]:
    raised = alarms(history)
    rows = history.tables["alarms"].records()
    if raised is None:
        yield Point(
            "unknown",
            "Whether the layers shifted is not known: no monitor's numbers are in this log.",
            cure="Add ActivationShiftMonitor to the callbacks.",
        )
    elif not rows:
        if raised:
            yield Point(
                "alarm",
                f"{count(raised, 'alarm')}; this log does not say in which layers.",
                cure="Those that shifted most are below; a report of the run directory has the alarms in words.",
            )
    else:
        strongest = max(rows, key=lambda row: _real(row["score"]) or 0.0)
        places = len({row["layer"] for row in rows})
        steps = [int(row["step"] or 0) for row in rows]
        when = f"at step {steps[0]:,}" if len(set(steps)) == 1 else f"between steps {min(steps):,} and {max(steps):,}"
        where = f"in {places} layers, the strongest here:" if places > 1 else "here:"
        yield Point(
            "alarm",
            f"{count(raised, 'alarm')} {when}, {where}",
            layer=str(strongest["layer"]),
            cure=str(strongest["message"] or ""),
        )


def _estimation(history: RunHistory) -> Iterator[Point]:
    off = last_recalibration(history)
    if off and off[2] > _ESTIMATION:
        step, layer, shift = off
        yield Point(
            "attention",
            f"Before the recalibration at step {step:,}, running means were off by up to {number(shift)} running std:",
            layer=layer,
            cure="The recalibration mended it: keep recalibrating before each validation and before export.",
        )


def last_recalibration(history: RunHistory) -> tuple[int, str, float] | None:
    """Step, layer and shift of the layer that was off most before the last recalibration."""
    rows = [row for row in history.tables["recalibrations"].records() if row["mean_shift"] is not None]
    if not rows:
        return None
    step = max(int(row["step"] or 0) for row in rows)
    row = max((row for row in rows if row["step"] == step), key=lambda row: _real(row["mean_shift"]) or 0.0)
    return step, str(row["layer"]), float(row["mean_shift"] or 0)


def last(history: RunHistory, key: str) -> tuple[int, float] | None:
    """Step and value of what was logged last under a key."""
    series = history.metrics.get(key)
    return series[-1] if series else None


def typical(history: RunHistory, key: str) -> float | None:
    """The median of what was logged under a key."""
    series = history.metrics.get(key)
    return median(value for _, value in series) if series else None


def _real(value: Cell) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
