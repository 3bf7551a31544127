"""The check of the documents finds what is wrong with one."""

from __future__ import annotations

import pytest
from helpers.commands import check_command, commands, inline_commands
from helpers.documents import blocks


def run(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    for example in blocks(page):
        example.evaluate()


def shown(code, output):
    return f"```python\n{code}\n```\n\n```text\n{output}\n```\n"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ('print("accuracy 93.1 %")', "accuracy 90.0 %"),
        ('print("5 samples, 0.3 s")', "5 samples, 17.2 s"),
        ('print("a\\nb\\nc")', "…\nb\n…"),
        ('print("a 1\\nb 2")', "b 2\na 1"),
        ('print("one", 1)\n', "one   1"),
        ('print(float("nan"))', "nan"),
    ],
)
def test_an_output_may_differ_as_machines_do(code, output, tmp_path):
    run(shown(code, output), tmp_path)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ('print("accuracy 93.1 %")', "accuracy 30.0 %"),
        ('print("accuracy 93.1 %")', "loss 93.1 %"),
        ('print("a\\nb\\nc")', "…\nd"),
        ('print("a\\nb")', "a"),
        ('print("a")', "a\nb"),
        ("", "a"),
        ('print(float("nan"))', "1.0"),
    ],
)
def test_another_output_is_found(code, output, tmp_path):
    with pytest.raises(Exception, match=r"printed|shown"):
        run(shown(code, output), tmp_path)


def test_a_block_that_fails_is_found_with_its_line(tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        run("text\n\n```python\na = 1\na / 0\n```\n", tmp_path)
    assert error.traceback[-1].lineno + 1 == 5


def test_a_language_that_nobody_checks_is_found(tmp_path):
    with pytest.raises(Exception, match="how it is checked"):
        run("```toml\na = 1\n```\n", tmp_path)


def test_a_claim_that_does_not_hold_is_found(tmp_path):
    with pytest.raises(AssertionError):
        run("```python\na = 1\n```\n\n<!--- invisible-code-block: python\nassert a > 2\n-->\n", tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python scripts/nowhere.py", "does not exist"),
        ("python scripts/train.py fault=nowhere", "nowhere"),
        ("python scripts/train.py modle.network.width=3", "modle"),
        ("python scripts/train.py --multirun swap=ghost,nowhere2 data=nowhere", "nowhere"),
        ("torchrun --nproc_per_node=2 scripts/train.py trainer=nowhere", "nowhere"),
        ("bnkit-nothing", "no command"),
        ('pip install "bnkit[nothing]"', "no extra"),
        ("curl example", "how it is checked"),
    ],
)
def test_a_command_that_would_fail_is_found(command, message):
    with pytest.raises(Exception, match=message):
        check_command(next(commands(command)))


def test_commands_are_found_in_prose_and_tables_and_not_in_blocks():
    prose = "see `python scripts/train.py fault=inputs` | `bnkit-train a=1\nb=2` |\n"
    text = prose + "```bash\npython scripts/x.py\n```\n`momentum=1`"
    assert list(inline_commands(text)) == [
        ["python", "scripts/train.py", "fault=inputs"],
        ["bnkit-train", "a=1", "b=2"],
    ]
