"""The page around all sections: head, style, script, list of sections, and the button of colors.

Everything is in the one file. The content security policy forbids the page to load anything else.
"""

from collections.abc import Sequence
from pathlib import Path

from dist_lab.observe.report.markup import Html, Section, join, tag

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Returns the file's text. The list of sections has their headings."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} - dist_lab"),
        tag("style", source("page.css")),
    )
    button = tag("button", "Dark", type="button", id="theme", aria_pressed="false",
                 title="light or dark page")  # fmt: skip
    links = [tag("li", tag("a", one.title, href=f"#{one.id}")) for one in sections]
    body = tag(
        "body",
        tag("a", "to the content", href="#content", class_="skip"),
        tag("header", tag("div", tag("h1", title), tag("p", subtitle)), button),
        tag("nav", tag("ol", *links), aria_label="sections"),
        tag("main", *(one.html for one in sections), id="content"),
        tag("p", "", id="said", class_="hidden", aria_live="polite"),
        tag("script", source("page.js")),
    )
    return join([Html("<!doctype html>\n"), tag("html", head, body, lang="en")]) + "\n"


def source(name: str) -> Html:
    return Html((HERE / name).read_text(encoding="utf-8"))
