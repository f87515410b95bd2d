"""The page of the server in a real browser: Debian's Chromium, by `apt-get install chromium`."""

import pytest
from in_browser import WIDTHS, in_browser
from web_server import Letters, server_of

pytestmark = in_browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with server_of(tmp_path_factory.mktemp("line"), Letters(capacity=10**5, pace=0.01)) as running:
        yield running


@pytest.fixture
def opened(browser, server):
    """opened(width) -> the page, whose errors and requests elsewhere fail the test at its end."""
    problems, pages = [], []

    def note(message):  # a status of 400 is not the page's mistake
        if message.type == "error" and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def open_page(width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        home = f"http://127.0.0.1:{server.port}/"
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url.startswith((home, "data:")) or problems.append(r.url))
        page.goto(home)
        page.get_by_text("ready").wait_for()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_text_is_continued_as_it_comes_and_fits_the_screen(opened, width):
    page = opened(width)
    page.get_by_label("tokens at most").fill("40")
    page.get_by_label("your text").fill("def f(")
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Stop").wait_for()  # while it comes
    page.get_by_text("40 tokens, the first after").wait_for()
    assert page.locator("#log pre").text_content() == "def f(" + "".join(
        chr(40 + i) for i in range(1, 41)
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "007-letters - dist_lab"


def test_stop_ends_the_text_and_frees_its_blocks(opened, server):
    page = opened()
    page.get_by_label("tokens at most").fill("90000")
    page.get_by_label("your text").fill("a")
    page.get_by_label("your text").press("Control+Enter")
    said = page.locator("#log .said")
    server.until(lambda: len(said.text_content()) > 5)
    assert server.engine.running
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    server.until(lambda: not server.engine.requests)
    page.get_by_role("button", name="Continue").wait_for()


def test_a_chat_remembers_what_was_said(opened, server):
    page = opened()
    page.get_by_label("Chat").check()
    page.get_by_label("tokens at most").fill("3")
    for text in ("Hello", "More"):
        page.get_by_label("your text").fill(text)
        page.get_by_label("your text").press("Enter")
        page.get_by_text("3 tokens").wait_for()
    turns = page.locator("#log article").all_text_contents()
    assert turns == ["youHello", "model;<=", "youMore", "model;<="]
    asked = "User: Hello\nAssistant: ;<=\nUser: More\nAssistant:"
    assert page.evaluate("turns.length") == 4
    assert server.metric("dist_lab_prompt_tokens_total") >= len(asked)
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#log article").count() == 0


def test_an_error_is_shown_and_settings_are_checked(opened):
    page = opened()
    page.get_by_label("your text").fill("a" * 100_001)
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("the cache has room for 100,000").wait_for()
    page.get_by_label("top k").fill("0")
    page.get_by_role("button", name="Continue").click()
    assert page.evaluate("document.querySelector('#top_k').matches(':invalid')")
    assert page.locator("#log article").count() == 1


def test_everything_can_be_reached_by_the_tab_key(opened):
    page = opened()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert {"continue", "log", "prompt", "send", "clear", "temperature", "stop_at"} <= reached
