"""What the documents show works, and what they point to is there."""

from __future__ import annotations

import contextlib
import logging
import re
from unittest import SkipTest

import pytest
from helpers.commands import check_command, inline_commands
from helpers.documents import DOCUMENTS, ROOT, blocks
from helpers.reader import belongings

# Pages whose commands start Lightning in processes of their own, or that train for longer.
SLOW = {"tutorials/hydra.md", "tutorials/lightning_cli.md", "tutorials/watch.md"}


def name(path):
    return path.relative_to(ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT).as_posix()


def pages():
    for path in DOCUMENTS:
        marks = [pytest.mark.slow] if name(path) in SLOW else []
        yield pytest.param(path, id=name(path), marks=marks)


@pytest.mark.filterwarnings("ignore:.*GPU available", "ignore:.*does not have many workers", "ignore:.*isinstance")
@pytest.mark.parametrize("page", list(pages()))
def test_every_block_of_a_page_does_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("bnkit"), "level", logging.ERROR)
    document = blocks(page)
    if page.parent.name == "how-to" or page.parent == ROOT:
        document.namespace.update(belongings())
    for example in document:
        with contextlib.suppress(SkipTest):
            example.evaluate()


@pytest.mark.parametrize("page", [pytest.param(path, id=name(path)) for path in DOCUMENTS])
def test_a_block_that_is_left_out_says_why(page):
    assert not re.findall(r'^<!--+ *skip:(?! next ".{20,}").*', page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(path, id=name(path)) for path in DOCUMENTS])
def test_every_command_within_a_line_exists_and_composes(page):
    for command in inline_commands(page.read_text(encoding="utf-8")):
        check_command(command)


@pytest.mark.parametrize("page", [pytest.param(path, id=name(path)) for path in DOCUMENTS])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def test_the_two_commands_are_on_the_first_screen():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24])
    assert "pip install -c constraints.txt -e . && python scripts/train.py\n" in screen
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest\n' in screen


def test_docstrings_refer_as_mkdocstrings_reads_it():
    role = re.compile(r":(func|class|meth|mod|attr|data|exc|obj|math):`|^\s*\.\. math::|^\s*Example:$", re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "bnkit").rglob("*.py") if role.search(path.read_text())]
    assert not found, "write [`bnkit.recalibrate`][], $x$ and Examples: instead"
