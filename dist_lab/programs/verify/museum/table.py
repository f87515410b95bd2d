"""The results of the museum as text: a line, a page for one exhibit, a page for all.

line          one line an exhibit, for `--museum`
introduction, measured   what `--bug NAME` prints before and after the runs
page          museum.md, and the README of this folder
"""

import difflib
import re
from collections.abc import Iterator, Sequence

from dist_lab.programs.verify.museum.exhibit import Edit, Exhibit, sources_of
from dist_lab.programs.verify.museum.result import CHECKS, Result, digits
from dist_lab.programs.verify.museum.rooms import EXHIBITS, ROOMS, exhibit_named, room_of
from dist_lab.programs.verify.museum.trial import Outcome, in_words

SHORT = ("the loss", "AdamW's weights", "1 micro-batch", "same rows", "fewer ranks")


def line(result: Result) -> str:
    """One line, such as `norm-of-one-stage: grad norm at step 0, ...; missed by ...; caught`."""
    parts = [result.exhibit]
    if result.is_reached:
        parts = [f"{result.exhibit}: {found(result.wrong)}", losses(result.wrong)]
    if missed := missed_by(result):
        parts.append(f"missed by {', '.join(missed)}")
    return "; ".join([*filter(None, parts), result.verdict])


def found(outcome: Outcome) -> str:
    """What `verify` names first: quantity, tensor, step, rank and size."""
    if outcome.verdict == "failed":
        return "the ranks failed"
    if outcome.verdict == "refused":
        return f"refused: {re.split('[:;]', outcome.sentence)[0]}"
    first = outcome.first
    if first is None:
        return "all is equal"
    tensor = f" of {first.tensor}" if first.tensor else ""
    size = f"off by {first.error:.0e}" if first.error < float("inf") else "NaN, infinite or missing"
    return f"{first.quantity}{tensor} at step {first.step} on rank {first.rank}, {size}"


def losses(outcome: Outcome) -> str:
    """To how many digits the losses agree, step by step."""
    if not outcome.losses:
        return ""
    return f"the loss agrees to {', '.join(map(digits, outcome.losses))} digits"


def missed_by(result: Result) -> list[str]:
    pairs = zip(SHORT, result.checks, strict=False)
    return [short for short, check in pairs if check.sees is False]


def sentence(results: Sequence[Result]) -> str:
    """What was found, in one line."""
    caught = [result for result in results if result.is_caught]
    broken = [result.exhibit for result in results if not result.as_told]
    parts = [f"{len(results)} exhibits: {len(caught)} caught by verify"]
    parts.append(f"{len(results) - len(caught)} not caught")
    by_check = []
    for i, short in enumerate(SHORT):
        judged = [r.checks[i].sees for r in caught if r.checks and r.checks[i].sees is not None]
        by_check.append(f"{short} {judged.count(False)} of {len(judged)}")
    text = f"{', '.join(parts)}; missed by {', '.join(by_check)}"
    return text + (f"; NOT AS THEY SAY: {', '.join(broken)}" if broken else "")


def names() -> str:
    """The names of all exhibits, room by room."""
    return "\n".join(
        f"{room}\n" + "".join(f"  {exhibit.name}\n" for exhibit in exhibits)
        for room, exhibits in ROOMS.items()
    )


# --- one exhibit ----------------------------------------------------------------------------------


def introduction(exhibit: Exhibit) -> str:
    """The story, where it is described, and the function that is replaced, right and wrong."""
    parts = [
        f"{exhibit.name}   (room: {room_of(exhibit.name)})",
        "\n".join(f"  {text}" for text in exhibit.lines),
        "Described in\n" + "\n".join(f"  {address}" for address in exhibit.links.values()),
        f"The mistake replaces {exhibit.replaces}\n" + "\n".join(f"  {x}" for x in diff(exhibit)),
        f"Training {in_words(exhibit)} ...",
    ]
    return "\n\n".join(parts)


def diff(exhibit: Exhibit) -> list[str]:
    """The changed lines of the function and four around them; both sources, if all is changed."""
    right, wrong = (source.splitlines() for source in sources_of(exhibit))
    if isinstance(exhibit.mistake, Edit):
        return list(difflib.unified_diff(right, wrong, "right", "wrong", lineterm="", n=4))
    return ["--- right", *right, "", "+++ wrong", *wrong]


def measured(result: Result) -> str:
    """What the runs have shown."""
    rows = [
        ("without the mistake", result.right.sentence),
        ("with it", result.wrong.sentence if result.is_reached else "- (no step calls it)"),
        ("", losses(result.wrong) if result.is_reached else ""),
        *((check.name, str(check)) for check in result.checks),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}   {text}" for name, text in rows if text]
    verdict = f"caught: {found(result.wrong)}" if result.verdict == "caught" else result.verdict
    return "\n" + "\n".join(lines) + f"\n\n{verdict}"


# --- all exhibits ---------------------------------------------------------------------------------

HEAD = """# A museum of bugs

Each of these bugs is described in public: in a report about a trainer, or about a library that
trainers use, in a change that mends it, or in the code itself. An exhibit makes one again, by
replacing one function of dist_lab for the time of a run, and measures what shows: which tensor
`verify` names first, how far the loss can be trusted, and which cheaper checks would have missed
it. The strategies have no switch for any of them.

`python launch/verify.py --bug norm-of-one-stage` shows one: its story, the right function and the
wrong one, and all checks. `--bug list` has the names. `python launch/verify.py --museum --out DIR`
runs all in a few minutes, and writes this page as `DIR/museum.md`; nothing in it is written by hand
but the stories, which are in [rooms/](rooms/__init__.py). To add a bug, append it to a room.

How to read the tables:

* *verify names first* is the first quantity that differs from one process, in the order of a step:
  loss, gradients from the last layer to the first, gradient norm, weights, buffers.
* *the loss agrees to* so many digits, at steps 0, 1, 2 and 3.
* The other columns are cheaper checks. Each was run without the mistake, to see that it finds
  nothing then, and with it, and sees the bug (yes) or misses it (**no**):
  a look at the losses, to a relative 1e-3; at AdamW's weights after 4 steps, to 1e-4; `verify` with
  one micro-batch; with the same rows on all ranks; on a smaller mesh. A dash: it does not apply,
  or, in the first columns, no step calls the wrong function.
"""


def page(results: Sequence[Result]) -> str:
    """The page of the museum in Markdown: a table and the stories of each room."""
    parts = [HEAD, f"{sentence(results)}.\n"]
    for room in ROOMS:
        of_room = [result for result in results if result.room == room]
        parts += [f"## {room[0].upper()}{room[1:]}\n", markdown(of_room)]
        parts += [story(exhibit_named(result.exhibit), result) for result in of_room]
    return "\n".join(parts)


def markdown(results: Sequence[Result]) -> str:
    """A table in Markdown, one row for each exhibit."""
    head = ("exhibit", "verify names first", "the loss agrees to", *SHORT, "verdict")
    rows = [head, ("---",) * len(head), *map(_cells, results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(result: Result) -> tuple[str, ...]:
    marks = {True: "yes", False: "**no**", None: "-"}
    checks = [marks[check.sees] for check in result.checks] or ["-"] * len(CHECKS)
    first = found(result.wrong) if result.is_reached else "-"
    agree = ", ".join(map(digits, result.wrong.losses)) if result.is_reached else ""
    verdict = result.verdict.partition(":")[0]
    return f"`{result.exhibit}`", first, agree or "-", *checks, verdict


def story(exhibit: Exhibit, result: Result) -> str:
    """A paragraph about an exhibit, with its sources and what it replaces."""
    links = ", ".join(f"[{name}]({address})" for name, address in exhibit.links.items())
    return "\n".join(_paragraph(exhibit, result, links))


def _paragraph(exhibit: Exhibit, result: Result, links: str) -> Iterator[str]:
    yield f"**{exhibit.name}**"
    yield ""
    yield from exhibit.lines
    yield f"Described in {links}. Replaces `{exhibit.replaces.partition(':')[2]}` in"
    yield f"`{exhibit.replaces.partition(':')[0]}`; runs `{exhibit.cell}`."
    if not result.is_caught:
        yield f"*Not caught:* {exhibit.escapes}."
    yield ""


assert len(SHORT) == len(CHECKS)
assert len(set(EXHIBITS)) == sum(map(len, ROOMS.values())), "two exhibits of a name"
