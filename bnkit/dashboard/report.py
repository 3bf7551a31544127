"""The page: one HTML file that shows a run, without a network and without a server."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page.frame import THEMES
from bnkit.dashboard.page.sections import sections
from bnkit.dashboard.page.tiles import tiles
from bnkit.dashboard.page.verdict import judge

__all__ = ["FILE_NAME", "write_report"]

FILE_NAME = "report.html"
"""In the run directory."""


def write_report(history: RunHistory, path: str | Path) -> Path:
    """Write the page of a run; whole or not at all.

    The file has all that it shows and the library that draws it (about 5 MB), and asks nothing of the network. The same
    history gives the same bytes.

    Args:
        history: of the run; whatever is missing in it, the page says so.
        path: the file, ``report.html`` by convention; its folder is made where there is none.

    Returns:
        ``path``.
    """
    path = Path(path)
    text = _render(history)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(partial).chmod(0o644)  # as any other file; mkstemp's own is for the owner alone
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def _render(history: RunHistory) -> str:
    parts = sections(history)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=_title(history),
        info=history.info,
        verdict=judge(history),
        tiles=list(tiles(history)),
        sections=parts,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup(get_plotlyjs()),
        payload=htmlsafe_json_dumps(_payload(parts), allow_nan=False, ensure_ascii=False, separators=(",", ":")),
    )


def _title(history: RunHistory) -> str:
    named = [history.info[key] for key in ("name", "run", "model") if history.info.get(key)]
    return f"BatchNorm report: {named[0]}" if named else "BatchNorm report"


def _payload(parts: list[Any]) -> dict[str, Any]:
    return {
        "themes": THEMES,
        "drawings": {
            drawing.identifier: [
                {
                    "figure": variant.figure,
                    "alternative": variant.alternative,
                    "note": variant.note,
                    "columns": variant.columns,
                    "rows": variant.rows,
                }
                for variant in drawing.variants
            ]
            for section in parts
            for drawing in section.drawings
        },
    }


def _asset(name: str) -> str:
    return resources.files("bnkit.dashboard.page").joinpath(name).read_text(encoding="utf-8")
