"""The strategies that a comparison runs: the words of --strategies.

fsdp, ddp@torch           a strategy, along its own axes or those of --mesh
fsdp2xtp2                 a mesh, with the strategies that it implies
zero1:pp2xdp2@torch       a mesh, the strategy of its data axes, and an implementation
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.mesh_text import mesh_word, read_mesh_word
from dist_lab.programs.cli.mixes import AXES, DATA, IllegalMix
from dist_lab.programs.cli.registry import STRATEGIES

IMPLS = ("hand", "torch", "accelerate")


@dataclass(frozen=True)
class ListedStrategy:
    """One strategy in --strategies. If it is listed twice, the labels are dp and dp#2.

    Attributes:
        strategy: of the data axes, as --strategy names it; implied by `mesh` if not named.
        mesh: its own mesh; None: that of --mesh, or else the strategy's default.
    """

    label: str
    strategy: str
    impl: str
    mesh: Mapping[str, int] | None = None

    @property
    def alone(self) -> bool:
        """Whether it runs in one process: rank 0 runs the whole batch, and the other ranks wait."""
        return not STRATEGIES[self.strategy].axes


def entries(words: Iterable[str]) -> list[ListedStrategy]:
    """Parse the words of --strategies.

    >>> [entry.label for entry in entries(["dp", "ddp@torch", "dp@hand", "pp2xtp2@hand"])]
    ['dp', 'ddp@torch', 'dp#2', 'pp2xtp2']

    Raises:
        UserError: no strategy, mesh or implementation of that name, or a mesh that is not for the
            strategy.
    """
    listed: list[ListedStrategy] = []
    for word in words:
        entry = read_entry(word.strip())
        alike = (entry.strategy, entry.impl, entry.mesh)
        earlier = sum((other.strategy, other.impl, other.mesh) == alike for other in listed)
        label = entry.label + (f"#{earlier + 1}" if earlier else "")
        listed.append(ListedStrategy(label, *alike))
    return listed


def read_entry(word: str) -> ListedStrategy:
    """Parse one word: NAME[@IMPL] or [NAME:]MESH[@IMPL]."""
    target, at, impl = word.partition("@")
    name, colon, mesh_text = target.rpartition(":")
    label, impl = word.removesuffix("@hand"), impl if at else "hand"
    if not colon and not looks_like_mesh(target):
        if target not in STRATEGIES or impl not in STRATEGIES[target].impls:
            raise no_such(word)
        return ListedStrategy(label, target, impl)
    if colon and name not in STRATEGIES:
        raise UserError(
            f"no strategy {shown(name)} in {shown(word)} (--strategies); give {one_of(DATA, name)}"
        )
    if impl not in IMPLS:
        raise UserError(
            f"no impl {shown(impl)} in {shown(word)} (--strategies); give {one_of(IMPLS, impl)}"
        )
    mesh = read_mesh_word(mesh_text, "--strategies")
    for axis in mesh:
        if axis not in AXES:
            raise UserError(
                f"no mesh axis {shown(axis)} in {shown(word)} (--strategies); give "
                f"{one_of(AXES, axis)}; a strategy is named before a colon: zero1:dp2xtp2"
            )
    run = Config(strategy=name or None, mesh=mesh)
    assert run.strategy is not None
    try:
        _ = run.strategies
    except IllegalMix as error:
        others = [f"{run.strategy}:{mesh_word(axes)}" for axes in error.meshes]
        others += [f"{other}:{mesh_word(mesh)}" for other in error.strategies]
        raise UserError(
            f"{error.problem} ({shown(word)} in --strategies); give {' or '.join(others)}"
        ) from None
    return ListedStrategy(label, run.strategy, impl, mesh)


def looks_like_mesh(text: str) -> bool:
    """Whether a word without a colon is a mesh: zero1 and zero3 are not.

    >>> [looks_like_mesh(word) for word in ("dp4", "zero3", "pp2xfsd2", "pp=2")]
    [True, False, True, False]
    """
    if text in STRATEGIES:
        return False
    first, *more = text.split("x")
    return any(re.search(r"\d", part) for part in more) or first.rstrip("0123456789") in AXES


def no_such(word: str) -> UserError:
    """The error of a word that is neither a strategy nor a mesh."""
    if "=" in word:
        return UserError(
            f"no strategy {shown(word)} (--strategies); write a mesh without punctuation, such as "
            "pp2xfsdp2, or give it as --mesh"
        )
    known = [f"{name}@{impl}" for name, row in STRATEGIES.items() for impl in row.impls]
    choices = one_of([*(one.removesuffix("@hand") for one in known)], word)
    return UserError(
        f"no strategy {shown(word)} (--strategies); give, separated by commas, meshes such as "
        f"pp2xfsdp2 or zero1:pp2xdp2, or {choices}"
    )
