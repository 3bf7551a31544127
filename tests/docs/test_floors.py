"""The picture of the floors is that of the house."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("floors", ROOT / "docs" / "_site" / "floors.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["floors"] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


floors = _load()
FLOOR_OF = {name: number for number, floor in enumerate(floors.FLOORS) for box in floor.boxes for name in box.modules}


def unit(path):
    """The module or package of bnkit that a file belongs to, as the picture names it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "bnkit" else parts[0]


FILES = [
    path
    for folder in ("bnkit", "scripts", "conf")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "bnkit" / "__init__.py"
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "bnkit":
            yield from (f"bnkit.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_module_has_its_place_and_no_other_is_drawn():
    assert {unit(path) for path in FILES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_upper_floor_imports_lower_ones_never_the_other_way_round(path):
    number = FLOOR_OF[unit(path)]
    for name in imports(path):
        if name.startswith("bnkit."):
            assert FLOOR_OF.get(name.split(".")[1], -1) <= number, f"{name} is on an upper floor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_floor_imports_no_package_of_an_upper_one(path):
    number = FLOOR_OF[unit(path)]
    above = {name for floor in floors.FLOORS[number + 1 :] for name in floor.imports}
    allowed = {name for floor in floors.FLOORS[: number + 1] for name in floor.imports}
    assert not {name.split(".")[0] for name in imports(path)} & (above - allowed)


def test_the_picture_is_the_one_that_the_script_draws():
    assert floors.PICTURE.read_text(encoding="utf-8") == floors.draw(), "python docs/_site/floors.py"
