"""The page in headless Chromium: drawn without a network, sorted, filtered and saved, from the phone to the desk.

Run with -m integration; needs the packages `plotly` and `playwright`, and a Chromium or Chrome that is installed
already.
"""

from __future__ import annotations

import csv
import os
import re
import shutil

import pytest

from eval.report.command import Options, main
from tests.helpers import made_report
from tests.helpers.made_report import FORMULA, SCRIPT

pytestmark = pytest.mark.integration

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page over results of every kind."""
    pytest.importorskip("plotly", reason="the package plotly is not installed")
    folder = tmp_path_factory.mktemp("report")
    results = made_report.everything(folder / "results")
    assert main(Options((str(results),), str(folder / "report.html"), tag=("one=chosen",))) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, file):
    """Opens the page in a window; afterwards there was no request but for the file, and no error."""
    contexts, requests, errors = [], [], []

    def open_page(viewport=DESK, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, accept_downloads=True))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [file.as_uri()] * len(contexts)
    assert not errors


def draw_all(page):
    """Scrolls to every figure, and waits until it is drawn."""
    for card in page.locator("[data-figure]:visible").all():
        card.scroll_into_view_if_needed()
        card.locator("svg.main-svg").first.wait_for()


def names(page) -> list[str]:
    """Names of the runs that are shown, in their order."""
    return page.locator("#runs-table tbody tr:visible th").all_inner_texts()


def saved(page, button) -> list[list[str]]:
    """Rows of the CSV that a button saves."""
    with page.expect_download() as download:
        button.click()
    assert re.fullmatch(r"[a-z0-9-]+\.csv", download.value.suggested_filename)
    return list(csv.reader(download.value.path().read_text("utf-8").splitlines()))


@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_window(opened, viewport, scheme):
    page = opened(viewport, scheme)
    draw_all(page)
    assert page.locator("[data-figure] svg.main-svg").count() > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.title() == "Results", "a name ran as a script"
    text = page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert text == ("rgb(27, 33, 30)" if scheme == "light" else "rgb(230, 235, 232)")


def test_names_stay_texts_in_figures(opened):
    page = opened()
    draw_all(page)
    legends = page.locator(".legendtext").all_text_contents()
    assert f"{FORMULA} (off)" in legends, "Plotly would set it in bold"
    assert not page.locator(".plot a, .plot script, .plot b").count()


def test_columns_sort_by_number_and_what_is_absent_stays_last(opened):
    page = opened()
    head = page.locator("#runs-table th", has_text="Loss persist")
    button = head.get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(page)[:2] == [SCRIPT, "one"], "the better one first"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert names(page)[:2] == ["one", SCRIPT]
    assert set(names(page)[2:]) == {"run0", FORMULA, "run"}
    page.locator("#runs-table th", has_text="Run").first.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert names(page) == sorted(names(page), key=str.lower)


def test_the_filter_hides_rows_and_their_figures(opened):
    page = opened()
    draw_all(page)
    page.get_by_label("Filter").fill("ONE tiny")
    assert names(page) == ["one"]
    assert page.get_by_role("status").inner_text() == "1 of 5 runs; the figures follow the filter"
    assert page.get_by_role("heading", name="Gate: one").is_visible()
    assert not page.get_by_role("heading", name=f"Inner losses: {SCRIPT}").is_visible()
    together = page.locator("[data-figure]", has_text="Loss by position, all runs")
    assert together.locator(".legendtext").all_text_contents() == ["one (persist)"]
    page.get_by_label("Filter").fill("")
    chip = page.get_by_role("button", name="no TTT")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    assert names(page) == [FORMULA]
    page.get_by_role("button", name="chosen").click()
    assert names(page) == [], "both tags at once"
    chip.click()
    assert names(page) == ["one"]


def test_csv_of_a_table_is_what_is_shown(opened):
    page = opened()
    page.get_by_label("Filter").fill("float32")
    rows = saved(page, page.get_by_role("button", name="CSV: Runs"))
    assert [row[0] for row in rows[1:]] == ["run0", "one", SCRIPT, f"'{FORMULA}"], "no formula for a spreadsheet"
    one = dict(zip(rows[0], rows[2], strict=True))
    assert one["Tags"] == "TTT, chosen"
    low, mean, high = (float(one[f"Loss persist{end}"]) for end in (" 95 % low", "", " 95 % high"))
    assert low < mean < high
    assert dict(zip(rows[0], rows[4], strict=True))["Loss persist"] == "", "absent, not 0"


def test_csv_and_table_of_a_figure(opened):
    page = opened()
    card = page.locator("[data-figure]", has_text="Recall, heard-before: one")
    rows = saved(page, card.get_by_role("button"))
    assert rows[0] == ["series", "gap, seconds", "benefit, nats per token", "95 % low", "95 % high", "units"]
    assert rows[1] == ["persist", "4", "0.181818", "0.171818", "0.191818", "12"]
    assert len(rows) == 1 + 4 * 4
    card.locator("summary").click()
    table = card.get_by_role("table")
    table.wait_for()
    assert table.get_by_role("row").count() == len(rows)
    assert [cell.inner_text() for cell in table.get_by_role("row").nth(1).get_by_role("cell").all()] == rows[1]


def test_a_choice_shows_another_layer(opened):
    page = opened()
    card = page.locator("[data-figure]", has_text="Inner losses: one")
    card.scroll_into_view_if_needed()
    card.locator("svg.main-svg").first.wait_for()
    card.locator("summary").click()
    card.get_by_role("table").wait_for()
    assert card.get_by_role("table").get_by_role("row").nth(1).inner_text().startswith("layer 1")
    card.get_by_role("combobox", name="TTT layer").select_option("layer 4")
    assert card.get_by_role("table").get_by_role("row").nth(1).inner_text().startswith("layer 4")


def test_everything_has_a_name(opened):
    page = opened()
    draw_all(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [role=img], [role=region], section, nav')]
          .filter((e) => !(e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()
            || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    for landmark in ("banner", "navigation", "main", "contentinfo", "search"):
        assert page.get_by_role(landmark).count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "the link shows itself"
    assert page.evaluate("document.documentElement.lang") == "en"


def test_printing_draws_what_was_not_scrolled_to(opened):
    page = opened(scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    drawn = page.locator("[data-figure] svg.main-svg").count()
    assert drawn >= page.locator("[data-figure]:visible").count()
    assert page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill") == "rgb(27, 33, 30)"
