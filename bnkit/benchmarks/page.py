"""The results page, written by the command that measured: its numbers are never typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnkit.benchmarks.memory import MEANING
from bnkit.benchmarks.picture import draw
from bnkit.benchmarks.result import Result

__all__ = ["write_page"]

_INTRODUCTION = f"""# Benchmarks

<!-- Written by bnkit-benchmark output_markdown=…; run it again instead of editing. -->

What bnkit costs, beside what people would use instead. In each round every candidate runs once, in an order drawn anew,
and its time is divided by the baseline's of the same round: what slows the machine for a while slows both. The tables
have the median of the rounds and their 5th to 95th percentile. A goal is met where the median is within it. Seconds are
a machine's own and are not here.

CPU time: of the process, by all its threads. {MEANING}
"""

_ENOUGH = 10  # rounds: of fewer, percentiles are hardly more than the least and the largest

_SMALL = f"""
!!! warning "From a small run"

    At least one of these benchmarks ran with `quick=true` or fewer than {_ENOUGH} rounds: the page shows what is
    measured and how, and its numbers prove nothing yet.
"""


def write_page(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the Markdown page of one or several runs to ``path``, and its pictures beside it.

    Args:
        runs: as ``bnkit.benchmarks.run`` returns and stores them. Results of different devices stay apart; of a
            benchmark that ran twice on a kind of device, the later one of the list is taken.
        path: of the page.
    """
    latest = {(_device(run), result["bench"]): (run, result) for run in runs for result in run["results"]}
    lines = [_INTRODUCTION]
    if any(run["quick"] or stored["rounds"] < _ENOUGH for run, stored in latest.values()):
        lines.append(_SMALL)
    for device in dict.fromkeys(device for device, _ in latest):
        title = "On a CPU" if device == "cpu" else "On a GPU"
        lines.append(f"\n## {title}\n")
        chosen = {bench: found for (of, bench), found in latest.items() if of == device}
        for bench, (run, stored) in chosen.items():
            result = Result.from_dict(stored)
            picture = path.with_name(f"{path.stem}-{bench}-{device}.svg")
            anchor = f"{bench}-{device}"
            lines += [f"\n### {bench.capitalize()} {{ #{anchor} }}\n", result.question, ""]
            lines += _table(result)
            if draw(result, picture):
                lines += ["", f"![{bench}: the ratios of the table, with their spread]({picture.name})"]
            lines += [f"\n{note}" for note in result.notes]
            lines += [f"\nNot compared: {name}: {why}." for name, why in result.not_compared.items()]
            lines.append(f"\n{_circumstances(run, result)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n", encoding="utf-8")


def _table(result: Result) -> list[str]:
    header, *body = ([cell.replace("|", "&#124;") for cell in line] for line in result.cells())
    return [_line(header), _line(["---"] * len(header)), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _circumstances(run: dict[str, Any], result: Result) -> str:
    machine = run["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    if "accelerator" in machine:
        where = f"{machine['accelerator']} (CUDA {machine['cuda']}); {where}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"*`{run['command']}`, {result.rounds} rounds, seed {run['seed']}, {machine['date']}. {where}. "
        f"Python {machine['python']}, {versions}.*"
    )


def _device(run: dict[str, Any]) -> str:
    return "cpu" if run["device"] == "cpu" else "cuda"
