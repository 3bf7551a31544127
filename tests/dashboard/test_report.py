"""The page is written whole or not at all, and in colours that everyone can read."""

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from helpers.histories import history

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page.frame import THEMES
from bnkit.dashboard.report import write_report

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_same_history_gives_the_same_bytes(tmp_path):
    one, two = (write_report(history(6, points=5), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_report(RunHistory(info={"model": "\ud800"}), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_the_folder_is_made_where_there_is_none(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(RunHistory(), path) == path
    assert path.is_file()


def test_the_script_writes_the_page_of_a_run_directory(tmp_path):
    run = history(6, points=5)
    run.save(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "report.py", "run=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Report: run/report.html\n"
    assert (tmp_path / "run" / "report.html").read_bytes() == write_report(run, tmp_path / "other.html").read_bytes()


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(theme):
    css = resources.files("bnkit.dashboard.page").joinpath("page.css").read_text(encoding="utf-8")
    block = css[css.index(":root {" if theme == "light" else ':root[data-theme="dark"] {') :]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", block[: block.index("}")]))
    for behind in (colours["page"], colours["surface"]):
        for name in ("text", "muted", "accent", "alarm", "attention", "calm", "unknown"):
            assert contrast(colours[name], behind) >= 4.5, (name, behind)
        assert contrast(colours["control"], behind) >= 3, "the edge of a control"
    layout = THEMES[theme]["layout"]
    assert contrast(layout["font"]["color"], colours["surface"]) >= 4.5
    assert all(contrast(colour, colours["surface"]) >= 3 for colour in layout["colorway"])
