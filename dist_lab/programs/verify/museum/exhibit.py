"""An exhibit: a bug of others, made again by replacing one function of ours for one run.

    with patched(exhibit):
        verify(...)             # with the mistake
                                # without it again

No strategy has a switch for a fault: a mistake lives in the museum only. `replaces` names the one
function, class or entry of a table that the mistake replaces, as "module:name.in.the.module". Most
mistakes are an `Edit`: the text of the real function with a few words changed. So a mistake cannot
fall behind the function that it is made of, and the difference between the two is the bug.
"""

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_lab.loss import Pair
from dist_lab.optim.matrices import Groups
from dist_lab.programs.verify.matrix.cells import Cell

Mistake = Callable[[Any], Any]  # what is replaced -> what replaces it


@dataclass(frozen=True)
class Exhibit:
    """A bug, and the training run in which it shows.

    Attributes:
        name: unique, words joined by dashes.
        story: at most five lines: what was done, why it looks right, and what happens.
        sources: where it is described: "owner/repository#number", or an address.
        replaces: "module:name", of what the mistake replaces.
        cell: the training run: strategies, mesh, model, micro-batches.
        smaller: a mix on fewer ranks, on which a cheaper test would run; "" if there is none.
        optimizer: a name in trial.OPTIMIZERS.
        batch: changes the global batch.
        prepare: changes the model, in place.
        groups: gives the groups of the optimizer to both runs; called with the mistake in place.
        escapes: why `verify` cannot detect it, and what does; "" if it can.
        is_reached: a step calls what is replaced. If not, there is nothing to measure.
    """

    name: str
    story: str
    sources: tuple[str, ...]
    replaces: str
    mistake: Mistake
    cell: Cell
    smaller: str = ""
    optimizer: str = "adamw"
    batch: Callable[[Pair], Pair] = lambda batch: batch
    prepare: Callable[[nn.Module], object] = lambda model: None
    groups: Callable[[], Groups] | None = None
    escapes: str = ""
    is_reached: bool = True

    @property
    def lines(self) -> list[str]:
        """The story, line by line."""
        return textwrap.dedent(self.story).strip().splitlines()

    @property
    def links(self) -> dict[str, str]:
        """Short name -> address of each source.

        >>> from dist_lab.programs.verify.museum.rooms import exhibit_named
        >>> exhibit_named("norm-of-one-stage").links
        {'torchtitan#596': 'https://github.com/pytorch/torchtitan/issues/596'}
        """
        links = {}
        for source in self.sources:
            if source.startswith("https://"):
                path = source.removeprefix("https://github.com/").split("/")
                links[f"{path[1]}/{path[-1]}"] = source
            else:
                repository, _, number = source.partition("#")
                short = f"{repository.partition('/')[2]}#{number}"
                links[short] = f"https://github.com/{repository}/issues/{number}"
        return links


@contextmanager
def patched(exhibit: Exhibit) -> Iterator[None]:
    """Inside the block, the mistake is in place of what it replaces."""
    owner, name = place(exhibit.replaces)
    real = owner[name] if isinstance(owner, dict) else inspect.getattr_static(owner, name)
    wrong = exhibit.mistake(real)
    try:
        put(owner, name, wrong)
        yield
    finally:
        put(owner, name, real)


def place(replaces: str) -> tuple[Any, str]:
    """The module, class or table that holds something, and its name there."""
    module, _, path = replaces.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    assert name in (owner if isinstance(owner, dict) else vars(owner)), replaces
    return owner, name


def put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


@dataclass(frozen=True)
class Edit:
    """A mistake that is the real function with other text in one place.

    Attributes:
        right: text that the real function has exactly once. Its lines, and those of `wrong`, are
            indented relative to the first one.
    """

    right: str
    wrong: str

    def __call__(self, real: Any) -> Any:
        """Compile the edited text with the globals and the cells of the real function."""
        function = function_of(real)
        free, name = function.__code__.co_freevars, function.__name__
        body = textwrap.indent(self.text(real), "    ")
        factory = f"def make({', '.join(free)}):\n{body}\n    return {name}\n"
        made: dict[str, Any] = {}
        exec(compile(factory, f"<{name} with a mistake>", "exec"), function.__globals__, made)
        return made["make"](*(cell.cell_contents for cell in function.__closure__ or ()))

    def text(self, real: Any) -> str:
        """The source code of the function with the mistake."""
        source = source_of(real)
        before, found, after = source.partition(self._indented(self.right, source))
        assert found, f"{self.right!r} is not in {function_of(real).__qualname__}"
        assert self.right.partition("\n")[0] not in after, f"{self.right!r} is there twice"
        return before + self._indented(self.wrong, source) + after

    def _indented(self, text: str, source: str) -> str:
        """The text, with the lines after its first as deep as the place of the edit."""
        first = self.right.partition("\n")[0]
        line = next((line for line in source.splitlines() if first in line), "")
        depth = " " * (len(line) - len(line.lstrip()))
        return text.replace("\n", f"\n{depth}")


def function_of(real: Any) -> Any:
    """The function inside a static method or a decorated function."""
    return inspect.unwrap(real.__func__ if isinstance(real, staticmethod) else real)


def source_of(real: Any) -> str:
    """The source code of a function or class, not indented."""
    return textwrap.dedent(inspect.getsource(function_of(real)))


def sources_of(exhibit: Exhibit) -> tuple[str, str]:
    """The source code of what is replaced, and of what replaces it."""
    owner, name = place(exhibit.replaces)
    real = owner[name] if isinstance(owner, dict) else inspect.getattr_static(owner, name)
    if isinstance(exhibit.mistake, Edit):
        return source_of(real), exhibit.mistake.text(real)
    return source_of(real), source_of(exhibit.mistake(real))
