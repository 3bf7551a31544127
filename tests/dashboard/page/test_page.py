"""The page opens without a network, shows the numbers of the log, and can be read and used by everyone."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.histories import NASTY, history, layer_names, metrics_only

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.page.sections import sections
from bnkit.dashboard.page.wording import number
from bnkit.dashboard.report import write_report

RUNS = {
    "20 layers": history(20, points=40),
    "200 layers": history(200, points=60, channels=8),
    "metrics only": metrics_only(),
    "nothing": RunHistory(),
}
LAYER_COLUMNS = (
    *("layer", "alarms", "mean_shift", "estimation_shift", "batch_noise", "normalization_batch_size", "drift"),
    *("log_variance_ratio", "kl", "wasserstein2", "psi", "dropout_shift", "dead_fraction", "weight", "bias", "finite"),
    *("kind", "channels", "source"),
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the page is tested in a browser: pip install playwright")
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        found = found or playwright.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip("the page is tested in Chromium, and there is none here")
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in a browser without a network, and all that it said and asked for."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        self.url = path.as_uri()
        self.said, self.asked = [], []
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-drawn=all]", state="attached", timeout=30_000)

    def js(self, code, *arguments):
        return self.page.evaluate(code, *arguments)

    def becomes(self, code, expected, *arguments):
        """Wait until the page says what is expected: figures take their time."""
        for _ in range(100):
            if self.js(code, *arguments) == expected:
                return True
            self.page.wait_for_timeout(100)
        return False


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_report(run, folder / f"{name.replace(' ', '-')}.html") for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def opened(browser, paths):
    """Each run's page, opened once."""
    pages = {}

    def open_page(name):
        if name not in pages:
            pages[name] = Opened(browser, paths[name])
        return pages[name]

    yield open_page
    for page in pages.values():
        assert not page.said, "nothing that the tests did made the page complain"
        assert set(page.asked) == {page.url}


@pytest.mark.parametrize("name", RUNS)
def test_the_page_opens_without_a_complaint_and_asks_for_nothing(opened, name):
    page = opened(name)
    assert page.said == []
    assert page.asked == [page.url]


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_is_drawn(opened, name):
    expected = [drawing.identifier for section in sections(RUNS[name]) for drawing in section.drawings]
    drawn = opened(name).js(
        """() => [...document.querySelectorAll(".plot")].filter((plot) =>
             plot.querySelector(".scatterlayer .trace path, .heatmaplayer image")
             && plot.querySelector("svg").getBoundingClientRect().width > 200).map((plot) => plot.dataset.drawing)"""
    )
    assert drawn == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("name", ["20 layers", "200 layers"])
def test_the_tables_have_the_numbers_of_the_log(opened, name):
    tables = {
        "layers": ("layer", LAYER_COLUMNS),
        "alarms": ("step", ("step", "message", "layer", "code", "score")),
        "swaps": ("layer", None),
    }
    for table, (first, columns) in tables.items():
        logged = RUNS[name].tables[table]
        order = [first, *(column for column in columns or logged.columns if column != first)]
        shown = opened(name).js(
            "(id) => [...document.querySelectorAll(`#table-${id} tbody tr`)].map((row) =>"
            " [...row.cells].map((cell) => [cell.dataset.value, cell.textContent]))",
            table,
        )
        records = sorted(logged.records(), key=lambda row: row.get("step", 0))
        assert len(shown) == len(records)
        for cells, record in zip(shown, records, strict=True):
            for (value, text), column in zip(cells, order, strict=True):
                expected = record[column]
                if expected is None:
                    assert (value, text) == ("", "unknown")
                elif isinstance(expected, str):
                    assert value == expected
                else:
                    assert float(value) == expected
                    assert text == number(expected)


def test_the_figures_have_the_numbers_of_the_log(opened):
    run = RUNS["20 layers"]
    data = opened("20 layers").js(
        """() => Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.dataset.drawing,
             plot.data.map(({ x, y, customdata }) => ({ x, y, customdata }))]))"""
    )
    series = list(run.layers("bn_shift").values())
    assert data["heatmap"][0]["customdata"] == [[value for _, value in points] for points in series]
    for identifier, key in (("bn-gap_loss", "bn/gap_loss"), ("bn-alarms", "bn/alarms")):
        [trace] = data[identifier]
        assert list(zip(trace["x"], trace["y"], strict=True)) == run.metrics[key]


def test_the_numbers_in_the_verdict_are_those_of_the_log(opened):
    run = RUNS["20 layers"]
    tiles = opened("20 layers").js(
        "() => Object.fromEntries([...document.querySelectorAll('.tiles > div')].map((tile) =>"
        " [tile.querySelector('dt').textContent, tile.querySelector('.value').dataset.value]))"
    )
    assert float(tiles["Alarms"]) == len(run.tables["alarms"].rows)
    assert float(tiles["Train-eval gap"]) == run.metrics["bn/gap_disagreement"][-1][1]
    assert float(tiles["Largest mean shift now"]) == max(
        row["mean_shift"] or 0 for row in run.tables["layers"].records()
    )


def test_a_figures_numbers_are_a_table_too(opened):
    page = opened("20 layers")
    page.page.focus("#drawing-channels summary")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#drawing-channels details table")
    shown = page.js(
        "() => [...document.querySelectorAll('#drawing-channels tbody tr')].map((row) =>"
        " [...row.cells].map((cell) => Number(cell.dataset.value)))"
    )
    layer = page.js("() => document.querySelector('#channels-choice').selectedOptions[0].textContent")
    assert shown == [list(row[1:]) for row in RUNS["20 layers"].tables["channels"].rows if row[0] == layer]


def test_hostile_layer_names_are_shown_as_they_are_and_do_nothing(opened):
    page = opened("20 layers")
    assert page.js("() => document.querySelectorAll('script').length") == 4
    assert page.js("() => document.querySelectorAll('main b').length") == 0
    shown = page.js("() => [...document.querySelectorAll('#table-layers tbody th')].map((cell) => cell.textContent)")
    assert shown == layer_names(20)
    labels = page.js("() => [...document.querySelectorAll('#drawing-heatmap .ytick')].map((tick) => tick.textContent)")
    assert {NASTY[0], NASTY[2], NASTY[3]} <= set(labels)
    options = page.js("() => [...document.querySelectorAll('#channels-choice option')].map((one) => one.textContent)")
    assert set(NASTY) <= set(options)


def test_no_button_of_a_figure_sends_it_anywhere(opened):
    titles = opened("20 layers").js(
        "() => [...new Set([...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title))]"
    )
    assert titles == ["Download plot", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]


COLOUR_OF_TEXT = "() => getComputedStyle(document.querySelector('#drawing-worst .xtick text')).fill"


@pytest.mark.parametrize(("scheme", "text"), [("light", "rgb(60, 67, 75)"), ("dark", "rgb(198, 204, 211)")])
def test_the_page_and_its_figures_follow_the_systems_theme(opened, scheme, text):
    page = opened("20 layers")
    page.page.emulate_media(color_scheme=scheme)
    page.page.wait_for_selector(f"html[data-theme={scheme}]", state="attached")
    assert page.becomes(COLOUR_OF_TEXT, text)
    page.page.emulate_media(color_scheme="light")
    page.page.wait_for_selector("html[data-theme=light]", state="attached")


def test_everything_works_by_keyboard(browser, paths):
    page = Opened(browser, paths["20 layers"])
    keys = page.page.keyboard
    keys.press("Tab")
    assert page.js("() => document.activeElement.className") == "skip"
    keys.press("Tab")
    assert page.js("() => document.activeElement.id") == "theme"
    assert page.js("() => getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    keys.press("Space")
    assert page.js("() => document.querySelector('#theme').ariaPressed") == "true"
    assert page.becomes(COLOUR_OF_TEXT, "rgb(198, 204, 211)")

    numbers = "(plot) => JSON.stringify(document.querySelector(plot).data[0], ['x', 'y', 'customdata'])"
    for select in ("#heatmap-choice", "#channels-choice"):
        plot = select.replace("#", "#drawing-").replace("-choice", " .plot")
        before = page.js(numbers, plot)
        page.page.focus(select)
        keys.press("ArrowDown")
        assert page.becomes("(select) => document.querySelector(select).selectedIndex", 1, select)
        changed = "([plot, before]) => (" + numbers + ")(plot) !== before"
        assert page.becomes(changed, True, [plot, before])

    column = "#table-layers thead th:nth-child(3)"  # mean shift
    values = "() => [...document.querySelectorAll('#table-layers tbody tr')].map((row) => row.cells[2].dataset.value)"
    original = page.js(values)
    page.page.focus(f"{column} button")
    for order in ("descending", "ascending", "none"):
        keys.press("Enter")
        assert page.js("(column) => document.querySelector(column).ariaSort", column) == order
        shown = page.js(values)
        if order == "none":
            assert shown == original
        else:
            known = [float(value) for value in shown if value]
            assert known == sorted(known, reverse=order == "descending")
            assert shown[-1] == "", "what is not known is last"

    page.page.focus("#layers-filter")
    keys.type("LAYER4")
    visible = "() => [...document.querySelectorAll('#table-layers tbody tr')].filter((row) => !row.hidden).length"
    expected = sum("layer4" in name for name in layer_names(20))
    assert page.js(visible) == expected
    assert page.js("() => document.querySelector('#table-layers output').textContent") == f"{expected} of 20"
    assert page.said == []


@pytest.mark.parametrize("name", ["20 layers", "200 layers", "nothing"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen_and_no_two_labels_overlap(opened, name, width):
    page = opened(name)
    page.page.set_viewport_size({"width": width, "height": 900})
    page.page.wait_for_timeout(700)  # the figures take their new size
    assert page.js("() => document.documentElement.scrollWidth") <= width
    overlaps = page.js(
        """() => [...document.querySelectorAll(".plot")].flatMap((plot) =>
             [".xtick", ".ytick", ".x2tick", ".legendtext"].flatMap((kind) => {
               const boxes = [...plot.querySelectorAll(kind)].map((one) => one.getBoundingClientRect());
               return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
                 Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                 Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)).map(() => plot.dataset.drawing + kind);
             }))"""
    )
    page.page.set_viewport_size({"width": 1280, "height": 900})
    assert overlaps == []


@pytest.mark.parametrize("name", RUNS)
def test_the_page_can_be_read_without_seeing_it(opened, name):
    page = opened(name)
    assert page.js("() => document.documentElement.lang") == "en"
    levels = page.js("() => [...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in pairwise(levels))
    identifiers = page.js("() => [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(set(identifiers)) == len(identifiers)
    assert page.js(
        "() => [...document.querySelectorAll('nav a, .skip')].every((link) => document.querySelector(link.hash))"
    )
    assert page.js(
        """() => [...document.querySelectorAll("input, select, button")]
             .filter((one) => !one.closest(".js-plotly-plot"))
             .every((one) => (one.labels?.[0] ?? one).textContent.trim())"""
    ), "each control has a name"
    assert page.js("() => [...document.querySelectorAll('.plot')].every((plot) => plot.ariaLabel.length > 20)")
    assert page.js("() => [...document.querySelectorAll('table')].every((one) => one.caption?.textContent.trim())")
    assert page.js("() => [...document.querySelectorAll('th')].every((head) => ['row', 'col'].includes(head.scope))")
    assert page.js("() => [...document.querySelectorAll('svg.sign')].every((sign) => sign.ariaHidden === 'true')")
