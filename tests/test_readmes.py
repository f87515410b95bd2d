"""Each code block of each README runs: Python on two ranks, commands with the output they show."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
from programs import ROOT, run

from dist_lab.programs.cli.mixes import table

READMES = [ROOT / "README.md", *sorted((ROOT / "dist_lab").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^(?:\$ |pip .*&& )?((?:python launch/|torchrun )(?:[^\\\n]|\\\n)*)", re.MULTILINE
)
SHORT = {  # program: what makes it short, and leaves nothing behind
    "train.py": ["--steps", "2", "--val-every", "0"],
    "compare.py": ["--rounds", "8", "--steps", "1", "--size", "tiny"],
    "bench_comm.py": ["--rounds", "2"],
}
WRITES = ("train.py", "compare.py", "bench_comm.py")


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


LINK = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)")
PYTHON = [path for path in READMES if blocks(path, "python")]


def arguments(command: str) -> tuple[str, list[str]]:
    """The program and its arguments. torchrun's ranks are started by --nproc, which is quicker."""
    words = shlex.split(command.replace("\\\n", " "))
    ranks = [f"--nproc={word.partition('=')[2]}" for word in words if "nproc_per_node" in word]
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    return Path(words[at]).name, [*ranks, *words[at + 1 :]]


def marks(path: Path, command: str) -> list[pytest.MarkDecorator]:
    """By default the quickest runs, in `slow` a command of each program, and nightly the others."""
    if path == ROOT / "dist_lab/parallel/pipeline/README.md" and "explain.py" in command:
        return []
    first_pages = (ROOT / "README.md", ROOT / "dist_lab/programs/README.md")
    return [pytest.mark.slow if path in first_pages else pytest.mark.nightly]


COMMANDS = [
    pytest.param(
        *arguments(command), text[text.index(command) + len(command) :].strip("\n"),
        id=f"{name(path)}-{i}",
        marks=marks(path, command),
    )
    for path in READMES
    for text in blocks(path, "")
    for i, command in enumerate(COMMAND.findall(text))
    if "doctor.py" not in command  # tests/programs/doctor has it
]  # fmt: skip


def test_the_table_of_mixes_is_that_of_the_code():
    text = (ROOT / "dist_lab/parallel/README.md").read_text()
    for row in table():
        assert f"| {' | '.join(row)} |" in text


def test_there_are_blocks_to_run():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("path", READMES, ids=name)
def test_links_and_names_of_tests_lead_somewhere(path):
    text = path.read_text()
    for place, heading in LINK.findall(text):
        target = path.parent / place if place else path
        assert target.exists(), place
        assert not heading or heading in anchors(target), (place, heading)
    for named in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / named).exists(), named


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PYTHON, ids=name)
@pytest.mark.ranks(2)
def test_python_runs_from_the_top_of_a_page_to_its_end(path, mesh, tmp_path):
    page = {"__name__": "page"}
    with contextlib.chdir(tmp_path):  # some write files
        for text in blocks(path, "python"):
            exec(compile(text, name(path), "exec"), page)


@pytest.mark.parametrize(("program", "given", "shown"), COMMANDS)
def test_a_command_prints_what_is_shown(program, given, shown, tmp_path):
    out = ["--out", str(tmp_path)] if program in WRITES else []
    given = [str(tmp_path / word) if word.endswith(".svg") else word for word in given]
    done = run(program, *shortened(program, given), *out)
    printed = done.stdout + done.stderr  # to which collectives are logged
    assert done.returncode == 0, printed
    if shown and (program not in SHORT or "--log-collectives" in given):
        look = iter(plain(printed).splitlines())
        for line in plain(shown).splitlines():
            assert line == "..." or line in look, line


def shortened(program: str, given: list[str]) -> list[str]:
    """The same arguments, but for those that make a run long: a flag is given once."""
    if "--fault" in given:  # it is of a certain step
        return given
    instead = dict(zip(*[iter(SHORT.get(program, []))] * 2, strict=True))
    kept = [
        word
        for word, before in zip(given, ["", *given], strict=False)
        if word not in instead and before not in instead
    ]
    return [*kept, *(word for pair in instead.items() for word in pair)]


def plain(text: str) -> str:
    """Numbers that rounding decides are left out, and so is space at the end of a line."""
    text = re.sub(r"\d\.\de-\d\d", "?.?e-??", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
