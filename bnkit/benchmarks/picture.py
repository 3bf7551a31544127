"""A benchmark's picture: ratios with their spread and goals, or cost against size on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bnkit.benchmarks.result import COLUMNS, Curve, Result, Row

__all__ = ["draw"]

_TIMES = ("cpu", "wall")


def draw(result: Result, path: Path) -> bool:
    """Write the picture as SVG to ``path``.

    Returns:
        Whether there is one: not without matplotlib (of the extra bnkit[bench]), nor where nothing was timed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    timed = [row for row in result.rows if any(clock in row.found for clock in _TIMES)]
    if not result.curves and not timed:
        return False
    # Text as text, and the same bytes for the same numbers.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bnkit", "font.size": 9}):
        from matplotlib.figure import Figure

        figure = _against_size(Figure, result.curves) if result.curves else _side_by_side(Figure, timed)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")
    return True


def _against_size(figure_class: Any, curves: list[Curve]) -> Any:
    axes_of = list(dict.fromkeys(curve.axis for curve in curves))
    names = list(dict.fromkeys(curve.name for curve in curves))
    figure = figure_class(figsize=(3.6 * len(axes_of), 3.2))
    shared = None
    for number, axis in enumerate(axes_of, start=1):
        panel = shared = figure.add_subplot(1, len(axes_of), number, sharey=shared)
        for curve in (curve for curve in curves if curve.axis == axis):
            color = f"C{names.index(curve.name)}"
            panel.plot(curve.sizes, [one.median for one in curve.ratios], "o-", ms=3, color=color, label=curve.name)
            low, high = ([getattr(one, end) for one in curve.ratios] for end in ("low", "high"))
            panel.fill_between(curve.sizes, low, high, color=color, alpha=0.2, lw=0)
        panel.axhline(1, color="black", lw=0.8, ls=":")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("over the bare work")
    figure.axes[0].legend()
    return figure


def _side_by_side(figure_class: Any, table: list[Row]) -> Any:
    figure = figure_class(figsize=(6, 0.6 + 0.26 * len(table)))
    panel = figure.add_subplot()
    heights = range(len(table), 0, -1)
    for clock, marker, shift in (("cpu", "o", 0.12), ("wall", "s", -0.12)):
        for height, row in zip(heights, table, strict=True):
            if clock not in row.found:
                continue
            ratio = row.found[clock]
            color = "C0" if row.candidate.startswith(("bnkit", "import bnkit")) else "C7"
            panel.plot([ratio.low, ratio.high], [height + shift] * 2, color=color, lw=1)
            panel.plot(
                ratio.median, height + shift, marker, color=color, ms=4, mfc=color if clock == "cpu" else "white"
            )
            if row.goal and row.goal.measure == clock:
                panel.plot([row.goal.at_most] * 2, [height - 0.4, height + 0.4], color="C2", lw=1.5)
    panel.axvline(1, color="black", lw=0.8, ls=":")
    panel.set(xscale="log", xlabel=f"{COLUMNS['cpu']} ●, {COLUMNS['wall']} □: median, 5th to 95th percentile; goal |")
    panel.set_yticks(list(heights), [f"{row.what}: {row.candidate}" for row in table])
    panel.grid(axis="x", alpha=0.3)
    return figure
