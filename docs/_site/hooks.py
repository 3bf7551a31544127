"""What the pages need beside Markdown: formulas as MathML, and tables made from what they document."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_ROW = r"(?:(?!</tr>).)*?"
_SEVERAL = re.compile(rf'<tr class="doc-section-item">{_ROW}<code>[^<]*, [^<]*</code>{_ROW}</tr>', re.DOTALL)
_MARKER = re.compile(r"<!-- generated: ([a-z ]+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in ``<!-- generated: … -->``."""
    return _MARKER.sub(lambda marker: "\n".join(GENERATED[marker[1]]()), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Formulas as MathML, which browsers read without a script or a font of their own."""
    content = _FORMULA.sub(lambda found: _mathml(found[2], block=found[1] == "div"), content)
    # "a, b: see there": their defaults are in the signature, and the row knows none.
    return _SEVERAL.sub(lambda row: row[0].replace("<em>required</em>", ""), content)


def _mathml(formula: str, *, block: bool) -> str:
    return convert(html.unescape(formula), display="block" if block else "inline")


def model_keys() -> Iterator[str]:
    """A row for each scalar of the whole model."""
    from bnkit.dashboard.keys import MODEL_KEYS

    yield from ("| key | what | unit | meaning |", "|---|---|---|---|")
    yield from (_row(f"`{key.key}`", key.title, key.unit, key.meaning) for key in MODEL_KEYS)


def layer_keys() -> Iterator[str]:
    """A row for each scalar of each layer."""
    from bnkit.dashboard.keys import LAYER_KEYS

    yield from ("| key | what | unit | meaning |", "|---|---|---|---|")
    yield from (_row(f"`{key.prefix}/<layer>`", key.title, key.unit, key.meaning) for key in LAYER_KEYS)


def _row(*cells: str) -> str:
    # "|" within code would end the cell, and a bare one too.
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"


def config_groups() -> Iterator[str]:
    """Every option of every group that any Hydra app can compose, with the comments on its values."""
    for group in sorted(path for path in (ROOT / "conf" / "bnkit").iterdir() if any(path.glob("*.yaml"))):
        yield f"\n## /bnkit/{group.name}\n"
        for option in sorted(group.glob("*.yaml")):
            text = option.read_text(encoding="utf-8")
            yield from (f"### {option.stem}" + f" {{ #{group.name}-{option.stem} }}", "", "```yaml", text, "```", "")


def commands() -> Iterator[str]:
    """Every script: what it does, and how it is called, as its docstring says."""
    for script in sorted((ROOT / "scripts").glob("[!_]*.py")):
        says = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        does, _, usage = says.partition("Usage::\n")
        lines = usage.strip("\n").splitlines()
        examples = [line for line in lines if line.startswith("    ")]
        yield from (f"\n## bnkit-{script.stem}\n", does.strip(), "", "```bash")
        yield from (line.strip() for line in examples)
        yield from ("```", "")


GENERATED = {
    "model keys": model_keys,
    "layer keys": layer_keys,
    "config groups": config_groups,
    "commands": commands,
}
