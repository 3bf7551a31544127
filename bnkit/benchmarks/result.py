"""What a benchmark found: rows of ratios with their goals, curves over sizes, and what was not compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bnkit.benchmarks.timing import Ratio, Timings

__all__ = ["COLUMNS", "Curve", "Goal", "Result", "Row", "clock_of", "rows"]

Measure = Literal["cpu", "wall", "memory", "value"]

COLUMNS: dict[str, str] = {"cpu": "CPU time", "wall": "wall time", "memory": "peak memory", "value": "value"}
"""What a row may have measured, and what the column is called. All are ratios but ``value``, which the row names."""


@dataclass(frozen=True)
class Goal:
    """The most that a measure's median may be."""

    measure: Measure
    at_most: float

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Row:
    """One candidate in one setting.

    Attributes:
        what: the setting, such as ``"20 layers"``.
        candidate: what was measured.
        over: what it is compared with; empty for a plain value.
        found: ratios by measure.
        goal: None for what is only shown beside, such as a peer.
        note: a few words on it.
    """

    what: str
    candidate: str
    over: str
    found: dict[str, Ratio]
    goal: Goal | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``"met"`` where the median is within the goal, ``"missed"`` where it is not; empty without a goal."""
        if self.goal is None:
            return ""
        return "met" if self.found[self.goal.measure].median <= self.goal.at_most else "missed"

    def cell(self, measure: str) -> str:
        """Median and spread of a measure, empty where it was not taken."""
        if measure not in self.found:
            return ""
        ratio = self.found[measure]
        if ratio.low == ratio.high:  # memory is counted, not sampled
            return f"{ratio.median:.3g}"
        return str(ratio) if ratio.median >= 0.1 else f"{ratio.median:.2g} ({ratio.low:.2g} to {ratio.high:.2g})"


@dataclass(frozen=True)
class Curve:
    """A ratio over sizes, for the picture."""

    name: str
    axis: str  # what the sizes are of
    sizes: list[float]
    ratios: list[Ratio]


@dataclass(frozen=True)
class Result:
    """Everything that one benchmark has to tell.

    Attributes:
        bench: its name, as in ``bench=…``.
        device: it ran on.
        question: what is compared with what, in a sentence or two.
        rounds: measurements of each candidate.
        rows: the table.
        notes: sentences below the table.
        not_compared: peers by name, and why not.
        curves: cost against size.
        settings: the values of the benchmark's knobs.
    """

    bench: str
    device: str
    question: str
    rounds: int
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[list[str]]:
        """The table with its header; columns that nothing stands in are left out."""
        header = ["what", "candidate", "over", *COLUMNS.values(), "goal", "verdict", "note"]
        table = [
            [row.what, row.candidate, row.over, *map(row.cell, COLUMNS), *_goal(row), row.verdict, row.note]
            for row in self.rows
        ]
        used = [index for index in range(len(header)) if any(line[index] for line in table)]
        return [[line[index] for index in used] for line in [header, *table]]

    def table(self) -> str:
        """As plain text."""
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def text(self) -> str:
        """What the terminal shows: question, table, notes, and what was not compared."""
        missing = [f"not compared: {name}: {why}" for name, why in self.not_compared.items()]
        title = f"== {self.bench} ({self.device}, {self.rounds} rounds) =="
        return "\n".join([title, self.question, "", self.table(), "", *self.notes, *missing])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; no seconds in it."""
        table = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        return asdict(self) | {"rows": table}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Result:
        """The inverse of ``to_dict``."""
        table = [
            Row(
                **{key: row[key] for key in ("what", "candidate", "over", "note")},
                found={name: Ratio(**ratio) for name, ratio in row["found"].items()},
                goal=None if row["goal"] is None else Goal(**row["goal"]),
            )
            for row in stored["rows"]
        ]
        curves = [Curve(**curve | {"ratios": [Ratio(**one) for one in curve["ratios"]]}) for curve in stored["curves"]]
        return cls(**dict(stored) | {"rows": table, "curves": curves})


def rows(
    what: str,
    timings: Timings,
    memory: Mapping[str, int],
    *,
    goals: Mapping[str, Goal] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """A row for each candidate but the baseline."""
    goals, notes = goals or {}, notes or {}
    made = []
    for name in timings.cpu:
        if name == timings.baseline:
            continue
        found = {"cpu": timings.ratio(name, "cpu"), "wall": timings.ratio(name, "wall")}
        if memory.get(timings.baseline) and name in memory:
            found["memory"] = Ratio.of([memory[name] / memory[timings.baseline]])
        made.append(Row(what, name, timings.baseline, found, goals.get(name), notes.get(name, "")))
    return made


def clock_of(device: str) -> Measure:
    """What a goal is judged by: CPU time on the CPU; on an accelerator the wall, since the process only waits."""
    return "cpu" if device == "cpu" else "wall"


def _goal(row: Row) -> list[str]:
    return [f"{COLUMNS[row.goal.measure]} {row.goal}" if row.goal else ""]
