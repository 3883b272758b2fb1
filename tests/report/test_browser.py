"""The report in Chromium: no error, no request, no violation of accessibility rules, and useful without scripts.

Needs Debian's chromium, and playwright with axe-playwright-python, which drive it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.report.page import write_report
from tests.report.recorded import make_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    stages = [make_run("quickstart_2_reward", folder / "2_reward"), make_run("length_growth", folder / "3_ppo")]
    write_report([stages], folder / "report.html", "browser")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_no_error_no_request_and_nothing_wider_than_the_window(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert (said, asked) == ([], [report.as_uri()])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_search_order_and_values_under_the_pointer(report, browser):
    page = browser.new_page()
    page.goto(report.as_uri())
    gains = page.eval_on_selector_all(".sample", "all => all.map(each => Number(each.dataset.gain))")
    assert gains == sorted(gains, reverse=True)
    page.select_option("#order", "-gain")
    page.fill("#search", "question 9")  # 9 and 90 to 95
    assert page.inner_text("#shown") == "7 of 96 samples"
    shown = page.eval_on_selector_all(".sample:not([hidden])", "all => all.map(each => Number(each.dataset.gain))")
    assert shown == sorted(shown)
    page.hover("#stage-1 svg", position={"x": 200, "y": 100})
    assert "objective/score" in page.inner_text(".tip")
    page.close()


def test_without_scripts(report, browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(report.as_uri())
    assert page.locator(".sample").count() == 96
    assert page.locator("svg").first.is_visible()
    assert not page.locator("#search").is_visible()
    page.locator("summary", has_text="Table").first.click()
    assert page.locator("figure table").first.is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(report, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(report.as_uri())
    if scheme == "light":  # the same elements have other colors in the dark
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.close()
