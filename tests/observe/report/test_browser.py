"""Reports in a real browser, headless Chromium: Debian's, by `apt-get install chromium`."""

import json

import pytest
from finished_run import write_comparison, write_run
from in_browser import WIDTHS, in_browser
from programs import run

from dist_lab.observe.report.folder import read
from dist_lab.observe.report.run import page_of_run

pytestmark = in_browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The pages of a run, a comparison and several runs."""
    base = tmp_path_factory.mktemp("runs")
    folders = [write_run(base / "001-mix"), write_run(base / "002-mix", final_loss=1.7)]
    for folder in folders:
        (folder / "report.html").write_text(page_of_run(read(folder)))
    write_comparison(base / "003-compare", strategies=11)
    assert run("report.py", *folders).returncode == 0
    return {"run": folders[0] / "report.html", "several": base / "report.html",
            "comparison": base / "003-compare/report.html"}  # fmt: skip


@pytest.fixture
def opened(browser, reports):
    """opened(name, width) -> the page, whose errors and requests fail the test at its end."""
    problems, pages = [], []

    def open_page(name, width=1280, dark=False):
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        pages.append(page)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        file = reports[name].as_uri()
        page.on("request", lambda r: r.url.startswith(("data:", file)) or problems.append(r.url))
        page.goto(file)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


@pytest.mark.parametrize("name", ["run", "several", "comparison"])
def test_a_page_is_ready_within_a_second_and_fits_a_laptop_and_a_telephone(opened, name):
    for width in WIDTHS:
        page = opened(name, width)
        times = []
        for _ in range(3):  # other programs on the machine only make a load slower
            page.reload()
            times.append(
                page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            )
        assert 0 < min(times) <= 1000  # ms
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_headline_numbers_in_the_page_are_those_of_the_summary(opened, reports):
    summary = json.loads((reports["run"].parent / "summary.json").read_text())
    page = opened("run")
    shown = page.eval_on_selector_all(
        "#numbers data",
        "all => all.map(data => [data.dataset.field, data.value, data.textContent])",
    )
    assert len(shown) >= 7
    for field, value, text in shown:
        expected = summary
        for key in field.split("."):
            expected = expected[key]
        assert float(value) == expected
        number, scale = float(text.replace(",", "").rstrip("%")), 1.0
        scale = 100.0 if text.endswith("%") else 1e-6 if field.endswith("bytes") else 1.0
        assert number == pytest.approx(expected * scale, rel=0.005), field


def test_the_button_of_colors_works_by_click_and_by_key(opened):
    page = opened("run", dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    button = page.get_by_role("button", name="Light")
    seen = [page.evaluate(paper)]
    button.click()
    seen.append(page.evaluate(paper))
    page.get_by_role("button", name="Dark").press("Enter")
    seen.append(page.evaluate(paper))
    assert seen[0] == seen[2] != seen[1]
    page.keyboard.press("Space")
    assert page.evaluate(paper) == seen[1]


def test_a_table_is_sorted_by_click_and_by_key(opened):
    page = opened("comparison")
    first = "document.querySelector('#table tbody th').textContent"
    heading = page.locator("#table th").filter(has_text="peak memory")
    heading.get_by_role("button").click()
    assert page.evaluate(first) == "strategy0"
    heading.get_by_role("button").press("Enter")
    assert page.evaluate(first) == "strategy10"
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.locator("#said").text_content() == "sorted by peak memory, descending"


def test_a_chart_can_be_read_by_keys_and_a_parameter_shows_who_holds_it(opened):
    page = opened("run")
    chart = page.locator("#loss svg")
    chart.press("End")
    assert page.locator("#loss .tip").text_content().startswith("step 200  loss 1.5303")
    chart.press("ArrowLeft")
    assert "step 190" in page.locator("#said").text_content()
    page.locator("#mesh select").select_option(label="lm_head.weight")
    parts = page.locator("#mesh .rank").all_text_contents()
    assert parts[:4] == [f"{rank}nothing" for rank in range(4)]
    assert parts[4:] == ["4dim 0 0:64", "5dim 0 128:192", "6dim 0 64:128", "7dim 0 192:256"]


def test_the_timeline_zooms_and_moves_by_click_and_by_key_and_tells_of_each_span(opened):
    page = opened("run")
    figure, canvas = page.locator("figure.timeline"), page.locator("figure.timeline canvas")

    def view():
        first, last = map(float, figure.get_attribute("data-view").split())
        return first, last - first

    start, whole = view()
    page.get_by_role("button", name="zoom in").click()
    assert view()[1] == pytest.approx(whole / 2)
    canvas.press("+")
    assert view()[1] == pytest.approx(whole / 4)
    before = view()[0]
    canvas.press("ArrowRight")
    assert view()[0] > before
    page.get_by_role("button", name="earlier").click()
    assert view()[0] == pytest.approx(before)
    page.get_by_role("button", name="zoom to step 11").press("Enter")
    assert start < view()[0]
    canvas.press("0")
    assert view() == (start, whole)
    info = page.locator(".span-info")
    canvas.press(".")
    assert info.text_content().startswith("rank 0, forward, forward model.layers.0: ")
    canvas.press(".")
    assert "for all_gather over fsdp, forward model.layers.0, ring: payload 2.00 MB" in (
        info.text_content()
    )
    canvas.press("ArrowDown")
    assert info.text_content().startswith("rank 1, ")
    canvas.click(position={"x": 300, "y": 10})
    assert info.text_content().startswith("rank 0, ")


def test_everything_can_be_reached_by_the_tab_key(opened):
    page = opened("run")
    reached = set()
    for _ in range(99):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"A", "theme", "svg", "SUMMARY", "parameter", "DIV"} <= reached
