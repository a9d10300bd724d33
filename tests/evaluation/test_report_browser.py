"""The page in a real browser: nothing asked of a network, no error, no sideways scrolling, in both schemes."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import NAMES, Browser, find_browser
from PIL import Image
from reports import rich_report

from fewstep.evaluation.goals import parse_goal, reached
from fewstep.evaluation.report import write_report
from fewstep.evaluation.report.changes import changes
from fewstep.evaluation.results import Measured

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(NAMES)} is on the path")

# How far the page reaches beyond the window, and every element that does so outside of a box of its own.
OVERFLOW = """(() => {
  const wide = document.documentElement.clientWidth;
  const boxed = element => element.closest('.scroll') && !element.matches('.scroll');
  const out = [...document.body.querySelectorAll('*')].filter(
    element => !boxed(element) && element.getBoundingClientRect().right > wide + 0.5);
  const page = document.documentElement.scrollWidth;
  return {page: page - wide, window: wide - innerWidth, elements: out.map(e => e.outerHTML.slice(0, 80))};
})()"""
# Tables that are wider than their box can be scrolled in it, with the keyboard too.
CLIPPED = """[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)
  .filter(box => getComputedStyle(box).overflowX != 'auto' || box.tabIndex != 0).length"""
INVISIBLE = """[...document.querySelectorAll('svg, img')].filter(e => {
  const at = e.getBoundingClientRect();
  return at.width < 100 || at.height < 50 || (e.tagName == 'IMG' && e.naturalWidth == 0)}).length"""
SMALLEST = """Math.min(...[...document.querySelectorAll('th, td, p, dd, figcaption, small')]
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
# The least contrast (WCAG) of any text with the page behind it.
CONTRAST = """(() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  return Math.min(...[...document.querySelectorAll('h1, h2, p, th, td, small, figcaption, dt, dd')]
    .map(e => ratio(light(getComputedStyle(e).color))));
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that one can hold, names that are too long included."""
    report = rich_report()
    rows = [
        replace(row, model=f"{row.model}-with-a-name-that-does-not-end") if "meanflow" in row.model else row
        for row in report.rows
    ]
    report = replace(report, rows=tuple(rows))
    older = [replace(row, metrics={**row.metrics, "fd_debiased_pixels": Measured(2.0, 1.9, 2.1)}) for row in rows]
    found = changes(report, replace(report, rows=tuple(older)), "older.json")
    goals = [reached(parse_goal(text), report) for text in ("fd_pixels=1.05*teacher@4", "recall_pixels=teacher@2")]
    return write_report(report, tmp_path_factory.mktemp("page"), found, goals)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_quiet_and_fits(width: int, dark: bool, page: Path, browser: Browser) -> None:
    browser.seen.errors.clear()
    browser.seen.requests.clear()
    browser.open(page, width, dark)
    assert browser.evaluate("innerWidth") == width
    # What is folded has to fit as well.
    browser.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true })")
    assert browser.evaluate(OVERFLOW) == {"page": 0, "window": 0, "elements": []}
    assert browser.evaluate(CLIPPED) == 0
    assert browser.evaluate(INVISIBLE) == 0
    assert browser.evaluate(SMALLEST) >= 10
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.seen.errors == []
    asked = [address for address in browser.seen.requests if not address.startswith("data:")]
    assert asked == [page.resolve().as_uri()]
    top = np.asarray(Image.open(io.BytesIO(browser.screenshot(whole=False))).convert("L"))
    assert top.shape[1] == width
    # The scheme's paper at the corner, and words in the other colour.
    assert (top[0, 0] < 60) == dark
    assert (top > 200).any()
    assert (top < 60).any()


def test_the_listener_hears(page: Path, browser: Browser, tmp_path: Path) -> None:
    """A page that errs, asks and overflows is caught: the test above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body><img src='beside.png'><div style='width: 3000px'>x</div>"
        "<script>console.error('oh'); nothing.at.all</script>"
    )
    browser.seen.errors.clear()
    browser.seen.requests.clear()
    browser.open(bad, 390, False)
    assert browser.evaluate(OVERFLOW)["page"] > 2000
    assert any("beside.png" in address for address in browser.seen.requests)
    assert len(browser.seen.errors) >= 2


def test_it_prints(page: Path, browser: Browser) -> None:
    browser.open(page, 1280, True)
    assert browser.pdf().startswith(b"%PDF")
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.download')).display") == "none"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_the_csv_can_be_saved_from_the_page(page: Path, browser: Browser) -> None:
    browser.open(page, 1280, False)
    link = browser.evaluate("document.querySelector('a[download]').href")
    assert base64.b64decode(link.partition(",")[2]).decode() == (page.parent / "results.csv").read_text()
