"""The documents' code blocks, by language: what running or checking each of them means. Parsed by Sybil.

python    runs, the blocks of a page one after the other in one namespace; with a title it is the file of that name
text      after a block that printed is what it printed: the same words, and numbers about as large
yaml      a file where it has a title; composed by Hydra where it has a defaults list
bash      each command is run where its script is a file of the page, else checked: that it composes, or is known

A comment ``<!--- invisible-code-block: python`` has what a page claims as an assertion, and
``<!--- skip: next "reason"`` leaves a block out. Any other language is an error: no block goes unseen.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

from helpers.commands import check_command, commands, compose_app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_INFO = re.compile(r'(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?(?P<rest>[^\n]*)\n')
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?|\bnan\b|\binf\b")
_PYTHON = PythonEvaluator()


def blocks(path: Path) -> Document:
    """The page, its blocks ready to be evaluated in order; in the working directory they find their files."""
    return Document.parse(str(path), _fences, _claims, SkipParser())


def _fences(document: Document) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer(_INFO)(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = _evaluate
        yield region


def _claims(document: Document) -> Iterator[Region]:
    for region in DirectiveInHTMLCommentLexer("invisible-code-block", arguments="python")(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = _PYTHON
        yield region


def _evaluate(example: Example) -> str | None:
    lexemes = example.region.lexemes
    language, title = lexemes["language"], lexemes["title"]
    assert not lexemes["rest"], f"the parser knows language and title, not {lexemes['rest']!r}"
    if title is not None:
        Path(title).parent.mkdir(parents=True, exist_ok=True)
        Path(title).write_text(example.parsed, encoding="utf-8")
    if language == "python":
        if title is None:
            _printed(example, _run_python(example))
        else:
            compile(example.parsed, title, "exec")
    elif language == "yaml":
        if "defaults" in (yaml.safe_load(example.parsed) or {}) and title is None:
            compose_app(example.parsed)
    elif language in ("bash", ""):
        _printed(example, "".join(_run_or_check(command) for command in commands(example.parsed)))
    elif language == "text":
        return _difference(example.namespace.get("_printed", ""), example.parsed)
    else:
        return f"a block in {language!r}: say in tests/helpers/documents.py how it is checked"
    return None


def _printed(example: Example, text: str) -> None:
    example.namespace["_printed"] = text


def _run_python(example: Example) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _PYTHON(example)
    return printed.getvalue()


def _run_or_check(command: list[str]) -> str:
    """Run ``python FILE …`` where FILE is of this page; else only check."""
    if command[0] == "python" and Path(command[1]).is_file() and Path.cwd() != ROOT:
        result = subprocess.run(
            [sys.executable, *command[1:]],
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
    check_command(command)
    return ""


def _difference(printed: str, shown: str) -> str | None:
    """None where each line that is shown was printed, and no other; the order is free, and ``…`` stands for any lines.

    (Layers that are listed by a measure may change places on another machine.)
    """
    rest = [line.strip() for line in printed.splitlines() if line.strip()]
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    for line in lines:
        if line == "…":
            continue
        found = next((other for other in rest if _alike(other, line)), None)
        if found is None:
            return f"{line!r} was not printed, but:\n{printed}"
        rest.remove(found)
    return f"more was printed than is shown:\n{printed}" if rest and "…" not in lines else None


def _alike(printed: str, shown: str) -> bool:
    if _NUMBER.sub("#", printed).split() != _NUMBER.sub("#", shown).split():
        return False
    pairs = zip(_NUMBER.finditer(printed), _NUMBER.finditer(shown), strict=True)
    # A time is the machine's, not bnkit's.
    return all(shown[b.end() :].startswith((" s", "s,")) or _about(a[0], b[0]) for a, b in pairs)


def _about(printed: str, shown: str) -> bool:
    """Training amplifies the last bit, in which machines differ: half as much again, or a twentieth, is alike."""
    a, b = (float(text.replace(",", "")) for text in (printed, shown))
    return a == b or (a != a and b != b) or abs(a - b) <= max(0.5 * max(abs(a), abs(b)), 0.05)
