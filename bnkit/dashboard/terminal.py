"""What the terminal says of a run at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnkit.monitoring.alarms import Alarm
from bnkit.monitoring.snapshot import Snapshot

__all__ = ["worst_layers"]

_ROWS = 5


def worst_layers(snapshot: Snapshot, alarms: Sequence[Alarm]) -> str:
    """The worst layers as a plain-text table, with a closing line on the alarms."""
    known = {name: m for name, m in snapshot.layers.items() if math.isfinite(m.mean_shift)}
    worst = sorted(known, key=lambda name: -known[name].mean_shift)[:_ROWS]
    width = max([len(name) for name in worst] + [len("layer")])
    lines = [
        f"Activation shift of the {len(worst)} worst of {len(snapshot.layers)} BatchNorm layers, in running standard "
        "deviations",
        "",
        f"{'layer':{width}}  {'mean shift':>10}  {'drift':>8}  {'batch noise':>11}  {'dead channels':>13}",
        *(
            f"{name:{width}}  {_cell(known[name].mean_shift):>10}  {_cell(known[name].drift):>8}  "
            f"{_cell(known[name].noise):>11}  {_percent(known[name].dead_fraction):>13}"
            for name in worst
        ),
        "",
    ]
    if not worst:
        lines = [f"The activation shift of no BatchNorm layer is known, of {len(snapshot.layers)}.", ""]
    unknown = [name for name in snapshot.layers if name not in known]
    if unknown:
        lines.append(f"Not known: {_why_unknown(snapshot, unknown[0])}{_and_others(unknown)}")
    lines.append(f"{len(alarms)} alarm{'s' * (len(alarms) != 1)}.")
    return "\n".join(lines + [f"- step {alarm.step}: {alarm.message}" for alarm in alarms[:_ROWS]])


def _why_unknown(snapshot: Snapshot, name: str) -> str:
    measures = snapshot.layers[name]
    reason = "its batch statistics were not finite" if measures.finite is False else "it gave no numbers"
    return f"{name}, {measures.source.removeprefix('unknown: ') if measures.source.startswith('unknown') else reason}"


def _and_others(names: Sequence[str]) -> str:
    others = len(names) - 1
    return f"; and {others} other layer{'s' * (others > 1)}." if others else "."


def _cell(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "unknown"


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "unknown"
