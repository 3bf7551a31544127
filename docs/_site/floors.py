"""Draws docs/assets/floors.svg: python docs/_site/floors.py. tests/docs/test_floors.py compares it with the imports."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).resolve().parents[1] / "assets" / "floors.svg"


class Box(NamedTuple):
    """A room: what it is for, and the modules or packages of bnkit in it, the one that gives it its name first."""

    purpose: str
    modules: tuple[str, ...]
    columns: int = 1


class Floor(NamedTuple):
    """Boxes side by side, and what they import beside the floors below."""

    title: str
    imports: tuple[str, ...]
    boxes: tuple[Box, ...]


FLOORS = (
    Floor(
        "torch",
        ("torch",),
        (
            Box("count, mean, variance", ("moments",)),
            Box("agree, or fail together", ("ranks",)),
            Box("which layers there are", ("layers",)),
            Box("undone after Ctrl-C too", ("preservation",)),
            Box("a batch to a model", ("feeding",)),
        ),
    ),
    Floor(
        "torch",
        ("torch",),
        (
            Box("what a layer normalised", ("observation",)),
            Box("what comes before a layer", ("tracing",)),
            Box("other statistics, for a block", ("running",)),
            Box("the variants, one family a file", ("norms",), 2),
        ),
    ),
    Floor(
        "torch, torchmetrics",
        ("torch", "torchmetrics"),
        (
            Box("", ("recalibration", "targets", "collection", "current_batch", "totals", "report", "stand_ins")),
            Box("", ("swapping", "rules", "conversion", "preceding")),
            Box("the measures", ("shift", "metrics")),
            Box("every layer, every step", ("monitoring", "probes")),
            Box("which of these a model needs", ("diagnosis",)),
        ),
    ),
    Floor(
        "lightning, wandb, plotly, jinja2",
        ("torch", "lightning", "wandb", "plotly", "jinja2"),
        (
            Box("say when, one Lightning callback a file", ("callbacks",), 3),
            Box("keys, W&B, the page", ("dashboard",), 2),
        ),
    ),
    Floor(
        "hydra, scikit-learn",
        ("torch", "torchmetrics", "lightning", "wandb", "hydra", "omegaconf", "sklearn"),
        (
            Box("the reference job", ("training",), 2),
            Box("what it costs", ("benchmarks",)),
            Box("Hydra apps and their configs", ("scripts", "conf", "resolvers", "mistakes"), 2),
        ),
    ),
)

# White on these reads on a light page and on a dark one.
_COLOURS = ("#283593", "#303f9f", "#3f51b5", "#00796b", "#546e7a")
_COLUMN, _HEIGHT, _GAP, _LEFT, _WRAP = 168, 84, 10, 60, 20


def draw() -> str:
    """The picture: the highest floor on top, as a house stands."""
    columns = 5
    width = _LEFT + columns * (_COLUMN + _GAP)
    height = len(FLOORS) * (_HEIGHT + 2 * _GAP + 8)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>The floors of bnkit: an upper one imports lower ones, never the other way round</title>",
    ]
    for number, floor in enumerate(FLOORS):
        top = height - (number + 1) * (_HEIGHT + 2 * _GAP + 8) + _GAP
        lines.append(f'<g data-floor="{number}">')
        lines.append(_text(22, top + 38, str(number), 30, "#7986cb", weight=700))
        lines.append(_text(22, top + 58, "floor", 12, "#808a94"))
        left = _LEFT
        for box in floor.boxes:
            wide = box.columns * _COLUMN + (box.columns - 1) * _GAP
            lines.append(
                f'<rect x="{left}" y="{top}" width="{wide}" height="{_HEIGHT}" rx="8" fill="{_COLOURS[number]}"/>'
            )
            middle = left + wide / 2
            said = _wrapped(box.purpose or ", ".join(box.modules[1:]), _WRAP * 1.35 * box.columns)
            names = ", ".join(box.modules) if box.purpose else box.modules[0]
            lines.append(_text(middle, top + 28, names, 16 if len(names) < 17 else 14, "#fff", weight=600))
            lines += [_text(middle, top + 49 + 16 * row, text, 12, "#fff") for row, text in enumerate(said)]
            left += wide + _GAP
        lines.append(_text(left - _GAP, top + _HEIGHT + 14, f"imports {floor.title}", 11, "#808a94", anchor="end"))
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def _wrapped(text: str, limit: float) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > limit:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _text(x: float, y: float, text: str, size: int, fill: str, *, weight: int = 400, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
