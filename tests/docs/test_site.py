"""The site is built by one command without warnings, and wants nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("material", reason="mkdocs-material is in bnkit[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        # the theme's word about its successor, which is no warning of the build
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


@pytest.mark.slow
def test_nothing_is_fetched_when_a_page_is_read(site):
    fetched = re.compile(
        r'<(?:script|img|iframe)[^>]+src="?(https?:)?//|<link[^>]+href="?https?://|url\(["\']?https?://'
    )
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not fetched.search(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    import bnkit.callbacks
    import bnkit.metrics
    import bnkit.norms
    import bnkit.probes

    anchors = {
        anchor
        for page in (site / "reference").glob("*.html")
        for anchor in re.findall(r'id="?([\w.]+)', page.read_text(encoding="utf-8"))
    }
    modules = (bnkit, bnkit.callbacks, bnkit.metrics, bnkit.norms, bnkit.probes, bnkit.shift)
    missing = [f"{module.__name__}.{name}" for module in modules for name in module.__all__]
    assert not [name for name in missing if name not in anchors]


@pytest.mark.slow
def test_docstrings_leave_no_markup_behind(site):
    for page in (site / "reference").glob("*.html"):
        text = re.sub(r"<pre.*?</pre>|<math.*?</math>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r":(?:func|class|meth):`|\]\[bnkit|&gt;&gt;&gt;|\.\. math|\$\\", text), page.name
