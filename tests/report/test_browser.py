"""The page in a browser: on a phone and a desk, in both colour schemes, nothing overflows and nothing is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from comkd_cli.report.details import Making
from comkd_cli.report.page import render
from tests.chromium import NAMES, Chromium, find_chromium
from tests.report.scored import scored_run
from tests.report.test_page import CURVE, LABELS, LATENCY, NASTY, STUDENT, TEACHER

pytestmark = [pytest.mark.slow, pytest.mark.needs_tool("|".join(NAMES))]

LONG = "a" * 90
OVERFLOWING = """[...document.querySelectorAll('body *')].filter((element) => {
    for (let above = element.parentElement; above; above = above.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(above).overflowX)) return false;
    return element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map((element) => element.outerHTML.slice(0, 120))"""
CONTRAST = """[...document.querySelectorAll('svg text, h1, td, th, figcaption, small, dd, .note')].map((element) => {
    const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
        const value = Number(part) / 255;
        return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    const light = (colour) => channels(colour).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const style = getComputedStyle(element);
    const ink = light(element.closest('svg') ? style.fill : style.color);
    const ground = light(getComputedStyle(element.closest('section') ?? document.body).backgroundColor);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
}).reduce((least, value) => Math.min(least, value))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    opened = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with names that are long, or look like markup."""
    folder = tmp_path_factory.mktemp("report")
    keys = [f"{LONG}{i}.png" for i in range(30)]
    names = (*NASTY[:2], LONG)
    runs = [
        scored_run(folder, STUDENT, TEACHER, LABELS, names, keys, history=CURVE, manifest=LATENCY, notices=(LONG,)),
        scored_run(folder, TEACHER, TEACHER, LABELS, names, keys, dataset=LONG),
    ]
    (folder / "report.html").write_text(render(runs, Making(f"comkd report {LONG}", folder, folder)), encoding="utf-8")
    return folder / "report.html"


def test_a_printed_page_is_light_and_shows_all(browser: Chromium, report: Path) -> None:
    with browser.open("about:blank") as tab:
        paper = 700  # pixels of A4 within its margins
        tab.call("Emulation.setDeviceMetricsOverride", width=paper, height=900, deviceScaleFactor=1, mobile=False)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        tab.call("Emulation.setEmulatedMedia", media="print", features=dark)
        tab.call("Page.navigate", url=report.as_uri())
        tab.wait_for("document.readyState === 'complete' && document.querySelector('footer') !== null")
        assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        cut = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollHeight > e.clientHeight + 1).length"
        assert tab.run(cut) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_fetches_nothing_and_is_legible(browser: Chromium, report: Path, width: int, scheme: str) -> None:
    with browser.open("about:blank") as tab:
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        tab.call("Page.navigate", url=report.as_uri())
        tab.wait_for("document.readyState === 'complete' && document.querySelector('footer') !== null")
        assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.run(OVERFLOWING) == []
        requests = tab.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [name for name in requests if not name.startswith("data:")] == []
        assert tab.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert tab.run("document.scripts.length") == 0
        dark = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 60)")
        assert dark == (scheme == "dark")
        assert tab.run(CONTRAST) >= 4.5  # WCAG 2.1, 1.4.3
