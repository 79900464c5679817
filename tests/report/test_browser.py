"""The page in headless Chromium: nothing sticks out, text has contrast, formulas are drawn, trees unfold."""

import re

import numpy as np
import pytest
from PIL import Image

from mm_prm.report import render_report

from ..browser import browser_test, open_browser
from .test_report import HOSTILE, pool_rows, problems, results, tree_row  # noqa: F401

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")]

FORMULA = r"So $\frac{a^2}{b} = \sqrt{2}$, and $\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$ is not $\frac{1}{$."
WIDE = "$$" + " + ".join(rf"\frac{{{number}}}{{x_{{{number}}}}}" for number in range(40)) + "$$"


@pytest.fixture(scope="module")
def page(results, problems, tmp_path_factory):  # noqa: F811
    pools = pool_rows()
    pools[0]["candidates"] = [[FORMULA, WIDE], ["x" * 400, HOSTILE], ["Bar A shows 7.", "The answer is 4."], [], ["6"]]
    tree = tree_row("problem-0", depth=9)
    tree["nodes"][1]["steps"] = [FORMULA]
    path = tmp_path_factory.mktemp("report") / "report.html"
    html = render_report(results, problems, pools, [tree], verifier="prm", facts={"a long word": "y" * 300})
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile") / "profile") as browser:
        yield browser


def luminance(color: str) -> float:
    """WCAG's relative luminance of a computed colour, `rgb(…)` or `color(srgb …)`."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", color)][:3]
    channels = np.array(numbers) / (1 if "srgb" in color else 255)
    return float(
        np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    )


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


COLORS = """[...document.querySelectorAll('p, td, dt, dd, summary, .text, .score, .mc, .mark, .badge, figure text')].map(element => {
  let behind = element;
  while (behind && /^rgba\\(.*, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const style = getComputedStyle(element);
  return [element instanceof SVGElement ? style.fill : style.color, getComputedStyle(behind || document.body).backgroundColor];
})"""


@browser_test
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_right(browser, page, tmp_path, width, scheme):
    browser.open(page.as_uri(), width, scheme)
    assert browser.errors() == []
    browser.run("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width
    # What is wider than the page scrolls within its own box, and nothing lies over its neighbour.
    outside = """[...document.querySelectorAll('body *')].filter(element => element.getBoundingClientRect().right > innerWidth + 1
      && !element.closest('.scroll, .formula')).map(element => element.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []
    pairs = browser.run(COLORS)
    assert len(pairs) > 100
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    columns = browser.run(
        "getComputedStyle(document.querySelector('section.problem')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (1 if width < 768 else 2)
    with Image.open(browser.screenshot(tmp_path / "page.png")) as picture:
        assert picture.width == width and picture.height > 3000
        brightness = np.asarray(picture.convert("L")).mean()
    assert brightness > 200 if scheme == "light" else brightness < 80


@browser_test
def test_formulas_are_drawn_and_broken_ones_are_text(browser, page):
    browser.open(page.as_uri())
    step = "document.querySelector('article .step .text')"
    assert browser.run(f"{step}.querySelector('math').namespaceURI") == "http://www.w3.org/1998/Math/MathML"
    boxes = f"[...{step}.querySelectorAll('mfrac > *')].map(element => element.getBoundingClientRect())"
    above, below = browser.run(f"{boxes}.map(box => [box.top, box.height])")
    assert above[1] > 0 and below[0] >= above[0] + above[1] * 0.8  # a fraction, not two letters in a row
    assert browser.run(f"{step}.textContent").strip().endswith(r"is not $\frac{1}{$.")
    assert browser.run("document.scripts.length") == 0 and HOSTILE in browser.run("document.body.textContent")


@browser_test
def test_trees_unfold(browser, page):
    browser.open(page.as_uri())
    deepest = (
        "[...document.querySelectorAll('.tree .text')].filter(element => element.textContent.includes('step 9'))[0]"
    )
    assert not browser.run(f"{deepest}.checkVisibility()")
    closed = "document.querySelector('.tree details.node:not([open]) > summary')"
    for _ in range(9):
        if browser.run(f"{deepest}.checkVisibility()"):
            break
        browser.run(f"{closed}.click()")
    assert browser.run(f"{deepest}.checkVisibility()")
