"""HTML as nested function calls, escaped unless it is HTML already: `tag`, `table`, `figure`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

VOID = {"br", "meta", "link", "wbr"}


class Html(str):
    """Text that is HTML, and is not escaped again."""

    __slots__ = ()


Content = str | int | None
Attribute = str | int | float | bool | None


def tag(element: str, /, *content: Content, **attributes: Attribute) -> Html:
    """Returns an element. In an attribute's name _ stands for a hyphen, and is left out at its end.

    None adds no content; an attribute that is None or False is left out.

    >>> tag("p", "a < b", tag("br"), class_="note", aria_hidden="true", title=None)
    '<p class="note" aria-hidden="true">a &lt; b<br></p>'
    """
    words = [element]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{escape(str(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if element in VOID else f"{opened}{join(content)}</{element}>")


def join(content: Iterable[Content]) -> Html:
    """Returns all content in a row, escaped."""
    return Html("".join(p if isinstance(p, Html) else escape(str(p), quote=False)
                        for p in content if p is not None))  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        number: by which the column is sorted; cells with numbers are aligned to the right.
    """

    content: Content
    number: float | None = None


def number(text: str, value: float, field: str | None = None) -> Cell:
    """A cell with a number: what is shown, and the exact value."""
    return Cell(data(text, value, field), value)


def data(text: str, value: float, field: str | None = None) -> Html:
    """A number as it is shown, and its exact value for a program."""
    return tag("data", text, value=repr(value), data_field=field)


def table(
    caption: str, head: Sequence[Content], rows: Sequence[Sequence[Content | Cell]],
    *, sortable: bool = False,
) -> Html:  # fmt: skip
    """Returns a table that scrolls on a narrow screen. The first cell of a row is its heading.

    Args:
        sortable: a column can be sorted by a click on its heading.
    """
    right = [i > 0 and any(_is_number(row[i]) for row in rows) for i in range(len(head))]
    titles = [
        tag("th", tag("button", text, type="button") if sortable and text else text, scope="col",
            class_="n" if at_right else None)
        for text, at_right in zip(head, right, strict=True)
    ]  # fmt: skip
    body = [
        tag("tr", *(_cell(cell, i, right[i]) for i, cell in enumerate(row))) for row in rows
    ]  # fmt: skip
    whole = tag(
        "table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *body),
        class_="sortable" if sortable else None,
    )  # fmt: skip
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(cell: Content | Cell, column: int, at_right: bool) -> Html:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    if column == 0:
        return tag("th", cell.content, scope="row", data_sort=cell.number)
    return tag("td", cell.content, class_="n" if at_right else None, data_sort=cell.number)


def _is_number(cell: Content | Cell) -> bool:
    return isinstance(cell, Cell) and cell.number is not None


def figure(caption: Content, *content: Content, details: Content = None, about: str = "") -> Html:
    """A chart with its caption, and its numbers as a table that unfolds.

    Args:
        details: the table.
        about: what the table has, on the line that unfolds it.
    """
    unfold = None
    if details is not None:
        unfold = tag("details", tag("summary", about or "the numbers as a table"), details)
    return tag("figure", tag("figcaption", caption), *content, unfold)


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    html: Html


def section(id_: str, title: str, *content: Content, lead: Content = None) -> Section:
    """A section of the page with its heading, and a sentence that says what is to be seen."""
    html = tag(
        "section", tag("h2", title, id=f"{id_}-title"),
        tag("p", lead, class_="lead") if lead else None, *content,
        id=id_, aria_labelledby=f"{id_}-title",
    )  # fmt: skip
    return Section(id_, title, html)


def items(lines: Iterable[Content], class_: str | None = None) -> Html:
    return tag("ul", *(tag("li", line) for line in lines), class_=class_)


def terms(pairs: Iterable[tuple[Content, Content]], class_: str | None = None) -> Html:
    """A list of names and values."""
    parts = chain.from_iterable((tag("dt", name), tag("dd", value)) for name, value in pairs)
    return tag("dl", *parts, class_=class_)
