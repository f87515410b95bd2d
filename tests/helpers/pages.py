"""Pages of a report, parsed."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The exact numbers of a page by field, its ids, links, and the tags that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.numbers, self.ids, self.loads, self.open = text, {}, set(), [], []
        self.headings: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        if "data-field" in found:
            self.numbers.setdefault(found["data-field"], set()).add(float(found["value"]))
        if "id" in found:
            assert found["id"] not in self.ids, found["id"]
            self.ids.add(found["id"])
        self.loads += [value for key, value in attributes if key in ("src", "href", "srcset")]
        if name not in ("meta", "link", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


class Cells(HTMLParser):
    """The exact numbers of each row of a table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[list[float]] = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        if name == "tr":
            self.numbers.append([])
        elif name == "data":
            self.numbers[-1].append(float(dict(attributes)["value"]))
        self.numbers = [row for row in self.numbers if row or row is self.numbers[-1]]
